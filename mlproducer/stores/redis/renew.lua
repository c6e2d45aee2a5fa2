#!lua flags=allow-oom
-- Renew claims. Returns the places of those that no longer hold.

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
