#!lua flags=allow-oom
-- Claim the oldest rows that are due, and quarantine what is no row.

if given_up() then return redis.error_reply('LATE this call was given up') end
local lease, horizon = tonumber(ARGV[3]), tonumber(ARGV[4])
local limit, room = tonumber(ARGV[5]), tonumber(ARGV[6])
local bad, keys, rows = {}, {}, {}

local function ripen(from, to, keeps)
  local found = redis.call('ZRANGEBYSCORE', P .. 'due', from, to, 'LIMIT', 0, 5000)
  local due, ready = {}, {}
  for _, key in ipairs(found) do
    if not keeps(key) then
      due[#due + 1] = key
      if string.find(key, '^%d+$') then add(ready, key, key) else bad[#bad + 1] = key end
    end
  end
  many('ZREM', 'due', due)
  many('ZADD', 'ready', ready)
end

-- Where the clock was set back, the times of all rows are moved along; the horizon catches what
-- this misses.
local seen = tonumber(redis.call('GET', P .. 'clock') or 0)
if now + 1000000 < seen then
  for _, name in ipairs({'due', 'ahead'}) do
    local moved, pairs_ = {}, redis.call('ZRANGE', P .. name, 0, -1, 'WITHSCORES')
    for i = 1, #pairs_, 2 do
      add(moved, text(pairs_[i + 1] - (seen - now)), pairs_[i])
    end
    many('ZADD', name, moved)
  end
end
if math.abs(now - seen) > 1000000 then redis.call('SET', P .. 'clock', text(now)) end

ripen('-inf', text(now), function() return false end)
ripen('(' .. text(now + horizon), '+inf', function(key)
  local owner = redis.pcall('HGET', P .. 'row:' .. key, 'owner')
  return type(owner) == 'string' and plausible(owner, redis.call('ZSCORE', P .. 'due', key))
end)
for _, key in ipairs(redis.call('ZRANGE', P .. 'ready', 0, limit - 1)) do
  local row = read(key)
  if row then
    room = room - #row[6] - #row[7]
    if room < 0 and #rows > 0 then break end
    rows[#rows + 1] = take(key, row)
    keys[#keys + 1] = key
  else
    bad[#bad + 1] = key
  end
end
many('ZREM', 'ahead', keys)
hold(keys, text(now + lease))
quarantine(bad)
return {now, rows, bad}
