-- Unregisters a consumer without pending entries. KEYS: stream, when each consumer's lease ends. ARGV: consumer.
if redis.call('XPENDING', KEYS[1], 'group', '-', '+', 1, ARGV[1])[1] then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], 'group', ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
