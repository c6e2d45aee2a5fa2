#!lua flags=no-writes
-- Return dead letters, without claiming them, and the place of the last one, in case none of them
-- can be read.

local rows, bad, room, last = {}, {}, tonumber(ARGV[5]), false
local dead = redis.call('ZRANGEBYSCORE', P .. 'dead', '(' .. ARGV[3], '+inf', 'LIMIT', 0, ARGV[4])
for _, key in ipairs(dead) do
  last = key
  local row = read(key)
  if row then
    room = room - #row[6] - #row[7]
    if room < 0 and #rows > 0 then break end
    rows[#rows + 1] = shown(key, row)
  else
    bad[#bad + 1] = key
  end
end
return {now, rows, bad, last and redis.call('ZSCORE', P .. 'dead', last) or ''}
