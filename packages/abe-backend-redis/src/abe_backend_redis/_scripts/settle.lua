-- Carries out settlements on entries that the consumer still has, each independently of the others.
-- KEYS: stream, delayed set, dead letters. ARGV: consumer, then for each: id, disposition (ack, retry, release, dead), delay in ms, reason, error.
-- Returns how many settlements were processed (not all, when many bytes had to be moved); the lost ids; and, alternating, the ids that failed
-- and their errors.
local now, lost, failed, bytes, processed = clock(), {}, {}, 0, 0

local function moved(entry, pending)
  local fields, attempts, named = {}, pending[4], false
  local before = nil
  for f = 1, #entry[2], 2 do
    if entry[2][f] == 'a' then before = entry[2][f + 1]
    else
      fields[#fields + 1] = entry[2][f]
      fields[#fields + 1] = entry[2][f + 1]
      named = named or entry[2][f] == 'm' or entry[2][f] == 'i'
    end
  end
  if before and #before < 16 and string.find(before, '^%d+$') then attempts = attempts + tonumber(before) end
  if not named then -- a foreign message keeps its first id
    fields[#fields + 1] = 'i'
    fields[#fields + 1] = entry[1]
  end
  fields[#fields + 1] = 'a'
  fields[#fields + 1] = string.format('%.0f', attempts)
  return fields
end

local function carry_out(id, disposition, delay, reason, trace)
  local pending = call('XPENDING', KEYS[1], 'group', id, id, 1, ARGV[1])[1]
  if not pending then
    lost[#lost + 1] = id
    return
  end
  if disposition == 'release' then
    -- Idle long enough for any consumer to claim it, and with the delivery not counted.
    local before = tostring(math.max(0, pending[4] - 1))
    call('XCLAIM', KEYS[1], 'group', 'released', '0', id, 'IDLE', '10000000000', 'RETRYCOUNT', before, 'JUSTID')
    return
  end
  local entry = disposition ~= 'ack' and call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    local fields = moved(entry, pending)
    bytes = bytes + size(fields)
    if disposition == 'dead' then
      for _, field in ipairs({'r', reason, 'e', trace, 't', string.format('%d', now)}) do fields[#fields + 1] = field end
      add(KEYS[3], fields)
    elseif delay > 0 then
      call('ZADD', KEYS[2], now + delay, id .. '|' .. cmsgpack.pack(fields))
    else
      add(KEYS[1], fields)
    end
  end
  call('XDEL', KEYS[1], id) -- first: an entry that is only deleted is cleaned up by a tick
  call('XACK', KEYS[1], 'group', id)
end

for i = 2, #ARGV, 5 do
  local done, why = pcall(carry_out, ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3], ARGV[i + 4])
  if not done then failed[#failed + 1] = ARGV[i]; failed[#failed + 1] = error_text(why) end
  processed = processed + 1
  if bytes >= BYTES then break end
end
return {processed, lost, failed}
