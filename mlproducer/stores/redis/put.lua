#!lua
-- Store rows, claimed, unless it is later than ARGV[4]. Returns the first key, and the token.

if given_up() then return redis.error_reply('LATE this call was given up') end
local lease, latest, width = tonumber(ARGV[3]), tonumber(ARGV[4]), 8
if now > latest then return {now} end
local count = (#ARGV - 4) / width
local first = math.max(now, tonumber(redis.call('GET', P .. 'last') or 0) + 1)
local keys, dead, ahead, token, until_ = {}, {}, {}, text(now - now % 2), text(now + lease)
redis.call('SET', P .. 'last', text(first + count - 1))
for i = 1, count do
  local at, key = 5 + (i - 1) * width, text(first + i - 1)
  local flags = ARGV[at]
  redis.call('HSET', P .. 'row:' .. key, 'token', token, 'owner', me,
    'doubtful', string.find(flags, 'u') and '1' or '0', 'state', ARGV[at + 1], 'id', ARGV[at + 2],
    'route', ARGV[at + 3], 'properties', ARGV[at + 4], 'body', ARGV[at + 5], 'sum', ARGV[at + 6],
    'accepted', ARGV[at + 7])
  keys[i] = key
  if string.find(flags, 'd') then add(dead, key, key) end
  if string.find(flags, 'a') then add(ahead, until_, key) end
end
many('ZADD', 'dead', dead)
many('ZADD', 'ahead', ahead)
hold(keys, until_)
return {now, first, token}
