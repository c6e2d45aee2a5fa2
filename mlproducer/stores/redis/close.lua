#!lua flags=allow-oom
-- Make all claims of one owner due.

local keys, ready = redis.call('ZRANGE', P .. 'own:' .. me, 0, -1), {}
for _, key in ipairs(keys) do
  if redis.pcall('HGET', P .. 'row:' .. key, 'owner') == me then
    redis.call('HSET', P .. 'row:' .. key, 'owner', '-' .. me, 'doubtful', '1')
    add(ready, key, key)
  end
end
many('ZREM', 'due', keys)
many('ZREM', 'ahead', keys)
many('ZADD', 'ready', ready)
redis.call('DEL', P .. 'own:' .. me)
return {now}
