-- Deletes a group. KEYS: groups, version, joining, then the group's keys. ARGV: group.
if redis.call('HGET', KEYS[3], 'group') == ARGV[1] then redis.call('DEL', KEYS[3]) end
local gone = {unpack(KEYS, 4)}
if type(redis.pcall('UNLINK', unpack(gone))) == 'table' then redis.call('DEL', unpack(gone)) end -- UNLINK frees in the background
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 then
  local now = redis.call('TIME')
  redis.call('SET', KEYS[2], now[1] .. '.' .. now[2] .. '.' .. ARGV[1])
end
return 1
