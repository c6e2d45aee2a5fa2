#!lua flags=allow-oom
-- Delete rows that have not been claimed since. A row that another owner put leaves its fate.

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
