-- What the scripts share; it stands before the body of each.

local P, me, number = KEYS[1], ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local function text(whole)
  return string.format('%.0f', whole)
end

-- unpack() of some 8,000 values overflows Lua's stack. The size of a slice is even, since some
-- lists hold pairs.
local function many(command, name, list)
  for i = 1, #list, 1000 do
    redis.call(command, P .. name, unpack(list, i, math.min(i + 999, #list)))
  end
end

local function add(pairs, score, key)
  pairs[#pairs + 1] = score
  pairs[#pairs + 1] = key
end

local function claimed(owner)
  return string.sub(owner, 1, 1) ~= '-'
end

-- Whether a claim that ends then can be one of its owner's, whose leases may be longer than ours.
local function plausible(owner, until_)
  local lease = string.match(owner, '%.(%d+)$')
  return claimed(owner) and lease and tonumber(until_) <= now + tonumber(lease)
end

-- Two answers: whether the row has not been claimed since, and whether the claim still holds.
local function mine(key, token)
  local seen = redis.pcall('HMGET', P .. 'row:' .. key, 'token', 'owner')
  if seen.err or seen[1] ~= token then return false, false end
  return seen[2] == me or seen[2] == '-' .. me, seen[2] == me
end

local FIELDS =
  {'token', 'owner', 'doubtful', 'id', 'route', 'properties', 'body', 'sum', 'state',
   'accepted', 'origin'}
local NEEDED = 9

-- Return a row, or nil where it is gone, or was not written by this library.
local function read(key)
  if not string.find(key, '^%d+$') then return nil end
  local row = redis.pcall('HMGET', P .. 'row:' .. key, unpack(FIELDS))
  if row.err or not string.find(row[1] or '', '^%d+$') then return nil end
  for i = 2, NEEDED do
    if not row[i] then return nil end
  end
  return row
end

-- Return a row as the client gets it: in few fields, since the client takes a while to parse each.
local function shown(key, row)
  local numbers = key .. ' ' .. row[1] .. ' ' .. row[3] .. ' ' .. row[8] .. ' ' .. (row[10] or 0)
  return {numbers, row[4], row[5], row[6], row[7], row[9]}
end

local function forget(keys)
  for _, name in ipairs({'due', 'ready', 'dead', 'ahead', 'own:' .. me}) do
    many('ZREM', name, keys)
  end
end

local function quarantine(keys)
  forget(keys)
  many('SADD', 'quarantine', keys)
end

-- 'due' is written last: a row is sent only once it stands there.
local function hold(keys, until_)
  local due, own = {}, {}
  for _, key in ipairs(keys) do
    add(due, until_, key)
    add(own, number, key)
  end
  many('ZREM', 'ready', keys)
  many('ZADD', 'own:' .. me, own)
  many('ZADD', 'due', due)
end

-- Claim a row that read() returned. After a lease that expired, the row is doubtful: the earlier
-- owner may have sent the message.
local function take(key, row)
  if claimed(row[2]) then
    redis.call('ZREM', P .. 'own:' .. row[2], key)
    row[3] = '1'
  end
  local before = string.gsub(row[2], '^-', '')
  if before ~= me and not row[11] then
    redis.call('HSET', P .. 'row:' .. key, 'origin', before)
  end
  local foreign = (row[11] or before) ~= me
  row[1] = text(row[1] - row[1] % 2 + (foreign and 3 or 2))
  redis.call('HSET', P .. 'row:' .. key, 'token', row[1], 'owner', me, 'doubtful', row[3])
  return shown(key, row)
end

-- Whether the client has given this call up, and has reported it as failed: it must change nothing.
local function given_up()
  return tonumber(redis.call('GET', P .. 'floor:' .. me) or 0) >= number
end
