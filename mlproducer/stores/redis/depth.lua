#!lua flags=no-writes
-- Count rows: all, dead letters, those stored ahead.

local dead = redis.call('ZCARD', P .. 'dead')
local all = redis.call('ZCARD', P .. 'due') + redis.call('ZCARD', P .. 'ready')
return {now, all, dead, redis.call('ZCOUNT', P .. 'ahead', '(' .. text(now), '+inf')}
