-- Moves due messages to the stream, and claims entries of dead consumers and released ones.
-- KEYS: stream, delayed set, dead letters, when each consumer's lease ends.
-- ARGV: consumer, its lease in ms, most to claim, whether its own entries too (0 or 1), unregistered consumers.
-- Returns the claimed entries as {id, fields, deliveries}; the ms until the next is due (-1: none, 0: call again); the server's time;
-- and whether the last tick or renewal was not long ago (0 or 1).
if call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('NOGROUP the stream is gone') end
local now, me, bytes, moved = clock(), ARGV[1], 0, 0

-- When memory is full Redis refuses this, and every move of a due message. Then no lease is recorded, and idle times alone show dead consumers.
local full, left = false, (call('ZSCORE', KEYS[4], me) or 0) - now
if left < ARGV[2] * 2 / 3 then -- not every time, as it is a write
  local reply = redis.pcall('ZADD', KEYS[4], now + ARGV[2], me)
  full = type(reply) == 'table' and reply.err
  if full and not string.find(full, 'OOM', 1, true) then return reply end
end

local function move(member)
  local fields = unpacked(member)
  if fields and pcall(add, KEYS[1], fields) then return true end
  return pcall(add, KEYS[3], {'p', member, 'r', 'undecodable', 'e', 'it is not a delayed message', 't', string.format('%d', now)})
end
while not full and moved < MOST and bytes < BYTES do
  local member = call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 1)[1]
  if not member then break end
  full = not move(member) -- retried once handled messages have freed memory
  if not full then call('ZREM', KEYS[2], member); moved = moved + 1; bytes = bytes + #member end
end

local claimed, room = {}, math.min(MOST, tonumber(ARGV[3]))
local function claim(owner, idle)
  if #claimed >= room then return end
  for _, pending in ipairs(call('XPENDING', KEYS[1], 'group', 'IDLE', idle, '-', '+', room - #claimed, owner)) do
    local entry = call('XCLAIM', KEYS[1], 'group', me, '0', pending[1])[1]
    if entry then
      claimed[#claimed + 1] = {entry[1], entry[2], pending[4] + 1}
      bytes = bytes + size(entry[2])
      if bytes >= BYTES then room = #claimed; return end
    else
      call('XACK', KEYS[1], 'group', pending[1]) -- its message was deleted by an acknowledgement whose XACK was lost
    end
  end
end
claim('released', '0')
-- Settlements that failed for good. A consumer that stood still, or was cut off, has its entries in hand, and is about to renew their leases.
local in_time = left > math.min(ARGV[2] / 3, ARGV[2] - 1000) -- there are two ticks a second
if in_time and ARGV[4] == '1' then claim(me, ARGV[2]) end
-- Each consumer's own lease is part of its name.
local function claim_expired(owner, lease_end)
  if owner == me then return end
  local lease = string.match(owner, '@(%d+)$') or ARGV[2]
  claim(owner, lease)
  if lease_end and lease_end + lease < now and not call('XPENDING', KEYS[1], 'group', '-', '+', 1, owner)[1] then
    call('XGROUP', 'DELCONSUMER', KEYS[1], 'group', owner)
    call('ZREM', KEYS[4], owner)
  end
end
local silent = call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'WITHSCORES', 'LIMIT', 0, full and 1000 or 100)
for i = 1, #silent, 2 do claim_expired(silent[i], tonumber(silent[i + 1])) end
for i = 5, #ARGV do claim_expired(ARGV[i]) end

local wait, nearest = -1, call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]
if #claimed >= room or moved >= MOST or bytes >= BYTES then wait = 0
elseif nearest and not full then wait = math.max(0, math.min(60000, math.ceil(nearest - now))) end
return {claimed, wait, now, in_time and 1 or 0}
