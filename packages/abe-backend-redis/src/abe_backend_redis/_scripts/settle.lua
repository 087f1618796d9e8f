-- Carries out verdicts on entries that are still the consumer's, each in one step.
-- KEYS: stream, delayed set, dead letters. ARGV: consumer, then for each: id, verb (ack, retry, release, dead), delay in ms, reason, error.
-- Returns the ids that were not the consumer's.
local call, lost = redis.call, {}
local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
for i = 2, #ARGV, 5 do
  local id, verb, delay = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  local pending = call('XPENDING', KEYS[1], 'group', id, id, 1, ARGV[1])[1]
  if not pending then
    lost[#lost + 1] = id
  elseif verb == 'release' then
    -- Old enough for anybody to claim, and its delivery forgotten.
    call('XCLAIM', KEYS[1], 'group', 'released', '0', id, 'IDLE', '10000000000', 'RETRYCOUNT', tostring(pending[4] - 1), 'JUSTID')
  else
    local entry = verb ~= 'ack' and call('XRANGE', KEYS[1], id, id)[1]
    if entry then
      local fields, attempts, named = {}, pending[4], false
      for f = 1, #entry[2], 2 do
        if entry[2][f] == 'a' then attempts = attempts + (tonumber(entry[2][f + 1]) or 0)
        else
          fields[#fields + 1] = entry[2][f]
          fields[#fields + 1] = entry[2][f + 1]
          named = named or entry[2][f] == 'm' or entry[2][f] == 'i'
        end
      end
      if not named then -- a stranger's: it keeps the id by which it was known first
        fields[#fields + 1] = 'i'
        fields[#fields + 1] = id
      end
      fields[#fields + 1] = 'a'
      fields[#fields + 1] = tostring(attempts)
      if verb == 'dead' then
        for _, field in ipairs({'r', ARGV[i + 3], 'e', ARGV[i + 4], 't', string.format('%d', now)}) do fields[#fields + 1] = field end
        call('XADD', KEYS[3], '*', unpack(fields))
      elseif delay > 0 then
        call('ZADD', KEYS[2], now + delay, id .. '|' .. cmsgpack.pack(fields))
      else
        call('XADD', KEYS[1], '*', unpack(fields))
      end
    end
    call('XACK', KEYS[1], 'group', id)
    call('XDEL', KEYS[1], id)
  end
end
return lost
