"""The scripts that a Redis store runs, one for each call of the protocol.

The first argument is the store's name for this process, the second the number of the call or 0.
What they change, and the functions they use, is described in `mlproducer.stores.redis.lua`.

Runs on: Redis's own thread, which serves everybody, and so never for long.
"""

from __future__ import annotations

from mlproducer.stores.protocol import FATES_LAST, MOST_FATES
from mlproducer.stores.redis.lua import (
    COMMON,
    FREELY,
    NOT_GIVEN_UP,
    WITH_ROOM,
    WITHOUT_WRITES,
)
from mlproducer.stores.redis.rows import MICROSECONDS

OPEN = (
    WITHOUT_WRITES
    + COMMON
    + """
local kinds = {due = 'zset', ready = 'zset', dead = 'zset', ahead = 'zset', fates = 'zset',
               quarantine = 'set', last = 'string', clock = 'string',
               ['own:' .. me] = 'zset', ['floor:' .. me] = 'string'}
for name, kind in pairs(kinds) do
  local found = redis.call('TYPE', P .. name).ok
  if found ~= kind and found ~= 'none' then
    return redis.error_reply('WRONGTYPE a foreign key')
  end
end
-- Nothing is written here: Redis judges whether a user may before it refuses to write.
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
  -- As Redis 7.0 says it, or as later ones and Valkey do.
  if string.find(refused, 'user executing the script', 1, true)
      or string.find(refused, 'ACL failure', 1, true) then
    return redis.error_reply('NOPERM the store needs ' .. command[1])
  end
end
return {now}
"""
)
"""Look whether the keys are ours, and whether this user may do all that the store will do.

Gives the time, as every script does, first of all.
"""

PUT = (
    WITH_ROOM
    + COMMON
    + NOT_GIVEN_UP
    + """
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
"""
)
"""Store rows, claimed, unless it is too late; the token says when that was."""

FREE = (
    FREELY
    + COMMON
    + """
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
"""
)
"""Let rows be due that a put has claimed; a second time it does nothing."""

UNDO = (
    FREELY
    + COMMON
    + """
redis.call('SET', P .. 'floor:' .. me, ARGV[2], 'PX', 3600000)
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
"""
)
"""Take back a call whose answer never came, or see to it that it does nothing when it comes late.

What it has put goes; what it has claimed is due; what it has released is claimed again.
"""

CLAIM = (
    FREELY
    + COMMON
    + NOT_GIVEN_UP
    + """
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

-- A clock that was put back takes the times of all rows along; horizon is for what it misses.
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
"""
)
"""Claim the oldest of what is due, and put aside what is no row."""

RELEASE = (
    FREELY
    + COMMON
    + NOT_GIVEN_UP
    + """
local lease, width = tonumber(ARGV[3]), 10
local lost, held, freed, due, dead, alive = {}, {}, {}, {}, {}, {}
for at = 4, #ARGV, width do
  local key, delay, flags = ARGV[at], tonumber(ARGV[at + 2]), ARGV[at + 3]
  local _, holds = mine(key, ARGV[at + 1])
  if holds then
    local row = P .. 'row:' .. key
    redis.call('HSET', row, 'state', ARGV[at + 4],
      'doubtful', string.find(flags, 'u') and '1' or '0', 'owner', delay < 0 and me or '-' .. me)
    if string.find(flags, 'd') then
      redis.call('HSET', row, 'id', ARGV[at + 5], 'route', ARGV[at + 6],
        'properties', ARGV[at + 7], 'body', ARGV[at + 8], 'sum', ARGV[at + 9])
      add(dead, key, key)
    else
      alive[#alive + 1] = key
    end
    if delay < 0 then
      held[#held + 1] = key
    else
      freed[#freed + 1] = key
      add(due, text(now + delay), key)
    end
  else
    lost[#lost + 1] = (at - 4) / width
  end
end
many('ZADD', 'dead', dead)
many('ZREM', 'dead', alive)
for _, keys in ipairs({held, freed}) do
  many('ZREM', 'ahead', keys)
  many('ZREM', 'ready', keys)
end
many('ZREM', 'own:' .. me, freed)
hold(held, text(now + lease))
many('ZADD', 'due', due)
return {now, lost}
"""
)
"""Note what became of claimed rows, and say which are claimed no longer."""

RENEW = (
    FREELY
    + COMMON
    + """
local until_ = text(now + tonumber(ARGV[3]))
local lost, keys, due = {}, {}, {}
for i = 4, #ARGV, 2 do
  local _, holds = mine(ARGV[i], ARGV[i + 1])
  if holds then
    keys[#keys + 1] = ARGV[i]
    add(due, until_, ARGV[i])
    redis.call('ZADD', P .. 'ahead', 'XX', until_, ARGV[i])
  else
    lost[#lost + 1] = (i - 4) / 2
  end
end
many('ZREM', 'ready', keys)
many('ZADD', 'due', due)
return {now, lost}
"""
)
"""Let claims begin anew, and say which hold no longer."""

DONE = (
    FREELY
    + COMMON
    + """
local keys, fates = {}, {}
for i = 3, #ARGV, 2 do
  if mine(ARGV[i], ARGV[i + 1]) then
    if ARGV[i + 1] % 2 == 1 then
      local dead = redis.call('ZSCORE', P .. 'dead', ARGV[i])
      add(fates, text(2 * now + (dead and 1 or 0)), ARGV[i])
    end
    redis.call('UNLINK', P .. 'row:' .. ARGV[i])
    keys[#keys + 1] = ARGV[i]
  end
end
forget(keys)
if #fates > 0 then
  many('ZADD', 'fates', fates)
  redis.call('ZREMRANGEBYSCORE', P .. 'fates', '-inf', text(2 * (now - FATES_LAST)))
  redis.call('ZREMRANGEBYRANK', P .. 'fates', 0, -MOST_FATES - 1)
end
return {now}
""".replace("FATES_LAST", str(int(FATES_LAST * MICROSECONDS))).replace(
        "MOST_FATES", str(MOST_FATES)
    )
)
"""Delete rows that nobody has claimed since; what another put leaves its fate."""

TRACE = (
    WITHOUT_WRITES
    + COMMON
    + """
local fates = {}
for i = 3, #ARGV, 2 do
  local seen = redis.pcall('HGET', P .. 'row:' .. ARGV[i], 'token')
  local fate = 'missing'
  if type(seen) == 'string' then
    fate = seen == ARGV[i + 1] and 'held' or 'taken'
  else
    local since = redis.call('ZSCORE', P .. 'fates', ARGV[i])
    if since then fate = tonumber(since) % 2 == 1 and 'dead-lettered' or 'confirmed' end
  end
  fates[#fates + 1] = fate
end
return {now, fates}
"""
)
"""Say what became of rows, in the words of `RowFate`."""

LETTERS = (
    WITHOUT_WRITES
    + COMMON
    + """
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
"""
)
"""Show dead letters, and where among them the last one stands, in case none can be read."""

SEIZE = (
    FREELY
    + COMMON
    + NOT_GIVEN_UP
    + """
local lease, horizon, key = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local row = read(key)
if not row or row[1] ~= ARGV[6] then return {now, {}, {}} end
local due = tonumber(redis.call('ZSCORE', P .. 'due', key) or 0)
local sound = due <= now + horizon or plausible(row[2], due)
if claimed(row[2]) and due > now and sound then return {now, {}, {}} end
local taken = take(key, row)
redis.call('ZREM', P .. 'ahead', key)
hold({key}, text(now + lease))
return {now, {taken}, {}}
"""
)
"""Claim one row, if it is as it was shown and nobody claims it."""

DEPTH = (
    WITHOUT_WRITES
    + COMMON
    + """
local dead = redis.call('ZCARD', P .. 'dead')
local all = redis.call('ZCARD', P .. 'due') + redis.call('ZCARD', P .. 'ready')
return {now, all, dead, redis.call('ZCOUNT', P .. 'ahead', '(' .. text(now), '+inf')}
"""
)
"""Count rows."""

QUARANTINE = (
    FREELY
    + COMMON
    + """
local bad = {}
for i = 3, #ARGV, 2 do
  local seen = redis.pcall('HMGET', P .. 'row:' .. ARGV[i], 'token', 'owner')
  local free = seen.err or not seen[2] or seen[2] == me or not claimed(seen[2])
  if free and (seen.err or ARGV[i + 1] == '' or seen[1] == ARGV[i + 1]) then
    bad[#bad + 1] = ARGV[i]
  end
end
quarantine(bad)
return {now}
"""
)
"""Put rows aside that could not be read, unless somebody has claimed them since.

A token is not given where the row has none, or another field is missing.
"""

CLOSE = (
    FREELY
    + COMMON
    + """
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
"""
)
"""Make all claims of one process due at once."""
