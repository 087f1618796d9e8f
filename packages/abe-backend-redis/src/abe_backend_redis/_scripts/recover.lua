-- After a lost connection, or at the end: gives back what the consumer was sent and does not know of.
-- KEYS: stream, the consumers' signs of life. ARGV: consumer, whether it leaves for good (1 or 0), the ids that it holds. Returns those of them that are not its own any more.
local call, held, ours = redis.call, {}, {}
for i = 3, #ARGV do held[ARGV[i]] = true end
local from = '-'
while from do
  local some = call('XPENDING', KEYS[1], 'group', from, '+', 500, ARGV[1])
  for _, pending in ipairs(some) do
    if held[pending[1]] then
      ours[pending[1]] = true
    else
      call('XCLAIM', KEYS[1], 'group', 'released', '0', pending[1], 'IDLE', '10000000000', 'RETRYCOUNT', tostring(math.max(0, pending[4] - 1)), 'JUSTID')
    end
  end
  from = #some == 500 and '(' .. some[500][1] or nil
end
local lost = {}
for i = 3, #ARGV do if not ours[ARGV[i]] then lost[#lost + 1] = ARGV[i] end end
if ARGV[2] == '1' then
  call('XGROUP', 'DELCONSUMER', KEYS[1], 'group', ARGV[1])
  call('ZREM', KEYS[2], ARGV[1])
end
return lost
