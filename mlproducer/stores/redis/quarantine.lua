#!lua flags=allow-oom
-- Quarantine rows that could not be read, unless they have been claimed since. The token is
-- empty where the row has none, or lacks another field.

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
