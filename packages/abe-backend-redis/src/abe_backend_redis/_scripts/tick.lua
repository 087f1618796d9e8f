-- Makes deliverable what is due, and claims what dead consumers hold and leaving ones gave back.
-- KEYS: stream, delayed set. ARGV: consumer, lease in ms, most to claim.
-- Returns the claimed entries as {id, fields, deliveries}, and the ms until the next one is due (-1: none is).
local call = redis.call
local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local full = false
local due = call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 500)
for _, member in ipairs(due) do
  local added = redis.pcall('XADD', KEYS[1], '*', unpack(cmsgpack.unpack(string.sub(member, string.find(member, '|', 1, true) + 1))))
  full = type(added) == 'table' and added.err
  if full then break end -- they wait until what is in the stream has been handled, and made room
  call('ZREM', KEYS[2], member)
end
local claimed = {}
for _, pending in ipairs(call('XPENDING', KEYS[1], 'group', 'IDLE', ARGV[2], '-', '+', ARGV[3])) do
  local entry = call('XCLAIM', KEYS[1], 'group', ARGV[1], '0', pending[1])[1]
  if entry then
    claimed[#claimed + 1] = {entry[1], entry[2], pending[4] + 1}
  else
    call('XACK', KEYS[1], 'group', pending[1]) -- its message was removed by an acknowledgement whose second half was lost
  end
end
local nearest = call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
return {claimed, nearest[2] and not full and math.max(0, math.ceil(nearest[2] - now)) or -1}
