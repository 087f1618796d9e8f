-- Registers a consumer. KEYS: groups, stream, when each consumer's lease ends. ARGV: group, consumer, lease in ms.
if not redis.call('HGET', KEYS[1], ARGV[1]) then return redis.error_reply("MISSING there is no group '" .. ARGV[1] .. "'") end
if redis.call('EXISTS', KEYS[2]) == 0 then return redis.error_reply('NOGROUP the stream is gone') end
local made = redis.pcall('XGROUP', 'CREATECONSUMER', KEYS[2], 'group', ARGV[2])
if type(made) == 'table' and made.err then
  -- Redis refuses this when memory is full, which is when consumers are needed most: the read creates the consumer too.
  return string.find(made.err, 'OOM', 1, true) and 0 or made
end
local t = redis.call('TIME')
redis.call('ZADD', KEYS[3], t[1] * 1000 + math.floor(t[2] / 1000) + ARGV[3], ARGV[2])
return 1
