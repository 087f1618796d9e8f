-- KEYS: version, groups. Returns the version and the groups with their patterns, atomically.
return {redis.call('GET', KEYS[1]) or '', redis.call('HGETALL', KEYS[2])}
