-- Copies messages to the groups that want them, if the groups are still those that the publisher knows.
-- KEYS: version, then a stream and a sorted set of delayed messages for each group.
-- ARGV: version, most waiting messages a group (0: no limit), then runs of: mask of groups, delay in ms, count, (meta, body) * count.
-- Returns the positions of the messages that a full group kept out.
local call, n = redis.call, (#KEYS - 1) / 2
if (call('GET', KEYS[1]) or '') ~= ARGV[1] then return redis.error_reply('STALE the groups have changed') end
local limit, room = tonumber(ARGV[2]), {}
if limit > 0 then
  for g = 1, n do
    local waiting = call('XLEN', KEYS[2 * g]) + call('ZCARD', KEYS[2 * g + 1])
    -- Looking who holds how many takes as long as there are consumers: only near the limit.
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
local rejected, position, i, top, stamp = {}, 0, 3, #ARGV, nil
while i <= top do
  local mask, delay, last = ARGV[i], tonumber(ARGV[i + 1]), i + 2 + 2 * ARGV[i + 2]
  local streams, wanted = {}, {}
  for g = 1, n do
    if string.byte(mask, g) == 49 then streams[#streams + 1] = KEYS[2 * g + (delay > 0 and 1 or 0)]; wanted[#wanted + 1] = g end
  end
  if delay > 0 and not stamp then stamp = call('TIME') end
  for j = i + 3, last, 2 do
    local fits = true
    if limit > 0 then
      for _, g in ipairs(wanted) do if room[g] <= 0 then fits = false end end
      if fits then for _, g in ipairs(wanted) do room[g] = room[g] - 1 end else rejected[#rejected + 1] = position end
    end
    if fits and delay > 0 then
      local due = stamp[1] * 1000 + math.floor(stamp[2] / 1000) + delay
      local member = stamp[1] .. '.' .. stamp[2] .. '-' .. position .. '|' .. cmsgpack.pack({'m', ARGV[j], 'p', ARGV[j + 1]})
      for s = 1, #streams do call('ZADD', streams[s], due, member) end
    elseif fits then
      for s = 1, #streams do call('XADD', streams[s], '*', 'm', ARGV[j], 'p', ARGV[j + 1]) end
    end
    position = position + 1
  end
  i = last + 1
end
return rejected
