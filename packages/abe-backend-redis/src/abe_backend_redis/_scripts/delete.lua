-- Ends a group. KEYS: groups, version, the group's stream, delayed set, dead letters and signs of life. ARGV: group.
redis.call('DEL', KEYS[3], KEYS[4], KEYS[5], KEYS[6])
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 then
  local now = redis.call('TIME')
  redis.call('SET', KEYS[2], now[1] .. '.' .. now[2] .. '.' .. ARGV[1])
end
return 1
