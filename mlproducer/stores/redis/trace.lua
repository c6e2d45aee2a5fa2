#!lua flags=no-writes
-- Return what became of rows, as the values of RowFate.

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
