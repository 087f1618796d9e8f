-- KEYS: version, groups. Returns the version and the groups with their patterns, as of one moment.
return {redis.call('GET', KEYS[1]) or '', redis.call('HGETALL', KEYS[2])}
