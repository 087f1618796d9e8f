-- Renews the leases that the consumer still has. KEYS: stream, when each consumer's lease ends. ARGV: consumer, lease in ms, ids.
-- Returns the lost ids.
local lost, ours = {}, {'XCLAIM', KEYS[1], 'group', ARGV[1], '0'}
for i = 3, #ARGV do
  if redis.call('XPENDING', KEYS[1], 'group', ARGV[i], ARGV[i], 1, ARGV[1])[1] then ours[#ours + 1] = ARGV[i] else lost[#lost + 1] = ARGV[i] end
end
if #ours > 5 then
  ours[#ours + 1] = 'JUSTID'
  redis.call(unpack(ours))
end
local t = redis.call('TIME')
redis.pcall('ZADD', KEYS[2], t[1] * 1000 + math.floor(t[2] / 1000) + ARGV[2], ARGV[1]) -- refused when memory is full: see tick
return lost
