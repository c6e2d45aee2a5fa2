#!lua flags=allow-oom
-- Claim one row, if it is as it was shown and is not claimed.

if given_up() then return redis.error_reply('LATE this call was given up') end
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
