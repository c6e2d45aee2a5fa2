#!lua flags=allow-oom
-- Note what became of claimed rows. Returns the places of those whose claim no longer holds.

if given_up() then return redis.error_reply('LATE this call was given up') end
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
