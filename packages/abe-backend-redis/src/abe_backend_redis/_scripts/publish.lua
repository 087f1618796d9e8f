-- Copies messages to the groups that want them, if the publisher's registry is still current.
-- KEYS: version, then a stream and a sorted set of delayed messages for each group.
-- ARGV: version, most waiting messages a group (0: no limit), then runs of: mask of groups, delay in ms, count, (meta, body) * count.
-- Returns the positions of the messages that a full group rejected, and {position, copies stored, error} of each that failed.
local call, n = redis.call, (#KEYS - 1) / 2
if (call('GET', KEYS[1]) or '') ~= ARGV[1] then return redis.error_reply('STALE the groups have changed') end
local limit, room = tonumber(ARGV[2]), {}
if limit > 0 then
  for g = 1, n do
    local waiting = call('XLEN', KEYS[2 * g]) + call('ZCARD', KEYS[2 * g + 1])
    -- XPENDING takes time proportional to the number of consumers: only near the limit.
    if limit - waiting < (#ARGV - 2) / 2 and call('EXISTS', KEYS[2 * g]) == 1 then
      local known, pending = pcall(call, 'XPENDING', KEYS[2 * g], 'group')
      if known then waiting = waiting - pending[1] end
      for _, consumer in ipairs(known and type(pending[4]) == 'table' and pending[4] or {}) do
        if consumer[1] == 'released' then waiting = waiting + consumer[2] end
      end
    end
    room[g] = limit - waiting
  end
end
local rejected, position, i, j, top, stamp, stored, copies = {}, 0, 3, nil, #ARGV, nil, false, 0
local function store()
  local call, args = call, ARGV -- locals are faster, in the loop of all publishing
  while i <= top do
    local mask, delay, last = args[i], tonumber(args[i + 1]), i + 2 + 2 * args[i + 2]
    local streams, wanted = {}, {}
    for g = 1, n do
      if string.byte(mask, g) == 49 then streams[#streams + 1] = KEYS[2 * g + (delay > 0 and 1 or 0)]; wanted[#wanted + 1] = g end
    end
    if delay > 0 and not stamp then stamp = call('TIME') end
    j = j or i + 3
    while j < last do
      local fits = true
      copies = 0
      if limit > 0 then
        for _, g in ipairs(wanted) do if room[g] <= 0 then fits = false end end
        if fits then for _, g in ipairs(wanted) do room[g] = room[g] - 1 end else rejected[#rejected + 1] = position end
      end
      if fits and delay > 0 then
        local due = stamp[1] * 1000 + math.floor(stamp[2] / 1000) + delay
        local member = stamp[1] .. '.' .. stamp[2] .. '-' .. position .. '|' .. cmsgpack.pack({'m', args[j], 'p', args[j + 1]})
        for s = 1, #streams do call('ZADD', streams[s], due, member); copies = s end
      elseif fits then
        for s = 1, #streams do call('XADD', streams[s], '*', 'm', args[j], 'p', args[j + 1]); copies = s end
      end
      stored = stored or copies > 0
      position = position + 1
      j = j + 2
    end
    i, j = last + 1, nil
  end
end
-- A message that fails does not fail the others. An error that concerns all, before anything is stored, is the reply.
while true do
  local fine, why = pcall(store)
  if fine then return rejected end
  why, stored = type(why) == 'table' and why.err or tostring(why), stored or copies > 0
  for _, code in ipairs(stored and {} or {'OOM ', 'READONLY ', 'MISCONF ', 'NOREPLICAS ', 'MASTERDOWN '}) do
    if string.find(why, code, 1, true) then return redis.error_reply(why) end
  end
  rejected[#rejected + 1] = {position, copies, why}
  position, j = position + 1, j + 2
end
