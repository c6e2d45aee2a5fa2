"""How the rows of a Redis store lie in Redis, and what its scripts have in common.

Redis runs a script as a whole, with nothing else in between, so each is a transaction. None is made
of data: what a script works on comes as an argument. All keys begin with the store's prefix and
share one hash tag, so that in a cluster they lie on one node:

- ``row:KEY``: a hash, one message. ``id``, ``route`` (JSON), ``properties`` and ``body`` (raw
  bytes) are the message, ``sum`` their CRC-32, ``state`` (JSON) what is known of its attempts.
  ``owner`` is who claims it, and ends with the length of its leases; it begins with ``-`` once
  that one has released it. ``origin`` is who put it, once another has claimed it. ``token`` is the
  fence, odd where the claim is not its origin's; ``accepted`` is in microseconds.
- ``due``: a sorted set, when each row is due, or its claim ends. ``ready``: those that are due,
  by key. A row is in one of the two.
- ``dead``: dead letters, by key. ``ahead``: rows stored ahead, until their claim ends.
- ``own:OWNER``: the rows that one process claims, by the number of the call that claimed them.
  ``floor:OWNER``: calls up to this number were given up, and do nothing any more.
- ``fates``: a sorted set, rows that another than their origin deleted, by twice the time of their
  end, and one more if they were dead letters.
- ``clock``: the time of a claim, a second ago at most, by which a clock that was put back is seen.
- ``last``: the last key. ``quarantine``: a set, the keys of rows that could not be read; such a row
  stays where it is, for whoever wants to look at it.

Time is the server's, in microseconds. It also makes keys and first tokens, so that neither comes
again after a FLUSHALL. Redis 7.0 is needed, where a script says what it may do: one that frees
memory, or takes hardly any, runs also where memory is full.

Runs on: Redis's own thread, which serves everybody, and so never for long.
"""

from __future__ import annotations

TAG = "{store}:"

FREELY = "#!lua flags=allow-oom\n"
WITH_ROOM = "#!lua\n"
WITHOUT_WRITES = "#!lua flags=no-writes\n"

COMMON = """
local P, me, number = KEYS[1], ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local function text(whole)
  return string.format('%.0f', whole)
end

-- Far below the 8,000 values at which Lua's stack ends; even, since some lists hold pairs.
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

-- Whether nobody has claimed the row since; then, whether the claim still holds.
local function mine(key, token)
  local seen = redis.pcall('HMGET', P .. 'row:' .. key, 'token', 'owner')
  if seen.err or seen[1] ~= token then return false, false end
  return seen[2] == me or seen[2] == '-' .. me, seen[2] == me
end

local FIELDS =
  {'token', 'owner', 'doubtful', 'id', 'route', 'properties', 'body', 'sum', 'state',
   'accepted', 'origin'}
local NEEDED = 9

-- A row, or nil where it is gone or is no row of ours.
local function read(key)
  if not string.find(key, '^%d+$') then return nil end
  local row = redis.pcall('HMGET', P .. 'row:' .. key, unpack(FIELDS))
  if row.err or not string.find(row[1] or '', '^%d+$') then return nil end
  for i = 2, NEEDED do
    if not row[i] then return nil end
  end
  return row
end

-- A row as it is given to the client: few fields, since each takes it a while to read.
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

-- What is due is written last: without that, nothing else of a row gets it sent.
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

-- Claim a row that read() gave. A claim that ended by itself leaves a doubt behind.
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
"""

NOT_GIVEN_UP = """
if tonumber(redis.call('GET', P .. 'floor:' .. me) or 0) >= number then
  return redis.error_reply('LATE this call was given up')
end
"""
