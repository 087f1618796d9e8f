-- Says that the consumer lives, and forgets those that hold nothing and have said nothing for a while.
-- KEYS: stream, the consumers' signs of life. ARGV: consumer, ms of silence after which one is forgotten. Returns how many were.
local call = redis.call
local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
if call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('NOGROUP the stream is gone') end
local made = redis.pcall('XGROUP', 'CREATECONSUMER', KEYS[1], 'group', ARGV[1])
if type(made) == 'table' and made.err then
  -- Redis refuses this when memory is full, and then consumers are needed most: the read makes the consumer too.
  return string.find(made.err, 'OOM', 1, true) and 0 or made
end
call('ZADD', KEYS[2], now, ARGV[1])
local gone = 0
for _, consumer in ipairs(call('XINFO', 'CONSUMERS', KEYS[1], 'group')) do
  local facts = {}
  for i = 1, #consumer, 2 do facts[consumer[i]] = consumer[i + 1] end
  -- Redis's own idle time does not do: before 7.2 it grows while a live consumer waits for messages.
  local heard = tonumber(call('ZSCORE', KEYS[2], facts.name) or 0)
  if facts.pending == 0 and facts.name ~= 'released' and heard < now - ARGV[2] then
    call('XGROUP', 'DELCONSUMER', KEYS[1], 'group', facts.name)
    call('ZREM', KEYS[2], facts.name)
    gone = gone + 1
  end
end
return gone
