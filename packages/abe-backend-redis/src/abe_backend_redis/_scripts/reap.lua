-- Forgets consumers that hold nothing and have not been heard of for a while. A live one that is forgotten by mistake is made again by its
-- next read. KEYS: stream. ARGV: ms. Returns how many.
local gone = 0
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], 'group')) do
  local facts = {}
  for i = 1, #consumer, 2 do facts[consumer[i]] = consumer[i + 1] end
  if facts.pending == 0 and facts.idle > tonumber(ARGV[1]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], 'group', facts.name)
    gone = gone + 1
  end
end
return gone
