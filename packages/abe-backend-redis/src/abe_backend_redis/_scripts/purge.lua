-- Deletes dead letters. KEYS: dead letters. ARGV: entry ids. Returns how many.
return redis.call('XDEL', KEYS[1], unpack(ARGV))
