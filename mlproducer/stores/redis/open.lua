#!lua flags=no-writes
-- Look whether the keys are of the store's types, and whether this user may run every command
-- that the scripts run. Returns the first command that is refused, if there is one.

local kinds = {due = 'zset', ready = 'zset', dead = 'zset', ahead = 'zset', fates = 'zset',
               quarantine = 'set', last = 'string', clock = 'string',
               ['own:' .. me] = 'zset', ['floor:' .. me] = 'string'}
for name, kind in pairs(kinds) do
  local found = redis.call('TYPE', P .. name).ok
  if found ~= kind and found ~= 'none' then
    return redis.error_reply('WRONGTYPE a foreign key')
  end
end
-- Nothing is written here: Redis checks a user's permissions before it refuses writes of a
-- read-only script.
local own, row = P .. 'own:' .. me, P .. 'row:' .. me
for _, command in ipairs({
  {'DEL', own}, {'GET', own}, {'SET', own, ''}, {'HGET', row, 'token'}, {'HMGET', row, 'token'},
  {'HSET', row, 'token', ''}, {'UNLINK', row}, {'SADD', own, ''}, {'ZADD', own, 0, ''},
  {'ZCARD', own}, {'ZCOUNT', own, 0, 0}, {'ZRANGE', own, 0, 0}, {'ZRANGEBYSCORE', own, 0, 0},
  {'ZREM', own, ''}, {'ZREMRANGEBYRANK', own, 0, 0}, {'ZREMRANGEBYSCORE', own, 0, 0},
  {'ZSCORE', own, ''}
}) do
  local answer = redis.pcall(unpack(command))
  local refused = type(answer) == 'table' and answer.err or ''
  -- The words of Redis 7.0, and those of later ones and of Valkey.
  if string.find(refused, 'user executing the script', 1, true)
      or string.find(refused, 'ACL failure', 1, true) then
    return {now, command[1]}
  end
end
return {now}
