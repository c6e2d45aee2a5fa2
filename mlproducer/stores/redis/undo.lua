#!lua flags=allow-oom
-- Undo a call whose answer never came, and keep it from taking effect if it comes late: what it
-- put is deleted, what it claimed is due, what it released is claimed again.

local floor = math.max(number, tonumber(redis.call('GET', P .. 'floor:' .. me) or 0))
redis.call('SET', P .. 'floor:' .. me, text(floor), 'PX', 3600000)
local keys, ready = redis.call('ZRANGEBYSCORE', P .. 'own:' .. me, number, number), {}
if ARGV[3] == 'put' then
  for _, key in ipairs(keys) do
    redis.call('UNLINK', P .. 'row:' .. key)
  end
  forget(keys)
elseif ARGV[3] == 'claim' then
  for _, key in ipairs(keys) do
    redis.call('HSET', P .. 'row:' .. key, 'owner', '-' .. me)
    add(ready, key, key)
  end
  many('ZREM', 'due', keys)
  many('ZREM', 'own:' .. me, keys)
  many('ZADD', 'ready', ready)
end
local back = {}
for i = 5, #ARGV, 2 do
  local since, held = mine(ARGV[i], ARGV[i + 1])
  if since and not held then
    redis.call('HSET', P .. 'row:' .. ARGV[i], 'owner', me)
    back[#back + 1] = ARGV[i]
  end
end
hold(back, text(now + tonumber(ARGV[4])))
return {now}
