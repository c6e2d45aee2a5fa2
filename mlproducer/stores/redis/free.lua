#!lua flags=allow-oom
-- Make rows due that a put has claimed. Run twice it does nothing the second time.

local due, keys = {}, {}
for i = 3, #ARGV, 3 do
  local key = ARGV[i]
  local _, held = mine(key, ARGV[i + 1])
  if held then
    redis.call('HSET', P .. 'row:' .. key, 'owner', '-' .. me)
    keys[#keys + 1] = key
    add(due, ARGV[i + 2], key)
  end
end
many('ZREM', 'ahead', keys)
many('ZREM', 'own:' .. me, keys)
many('ZADD', 'due', due)
return {now}
