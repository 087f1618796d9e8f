-- KEYS: stream, delayed set, dead letters. Returns waiting, in flight, delayed, dead, and the oldest waiting message's age in ms (-1: none).
local call = redis.call
local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local length, held, released, oldest = call('XLEN', KEYS[1]), 0, 0, nil
if call('EXISTS', KEYS[1]) == 1 then
  local known, summary = pcall(call, 'XPENDING', KEYS[1], 'group')
  if not known then summary = {0} end -- a publisher made the stream anew after it was deleted; its next consumer makes the group
  held = summary[1]
  for _, consumer in ipairs(type(summary[4]) == 'table' and summary[4] or {}) do
    if consumer[1] == 'released' then released = tonumber(consumer[2]) end
  end
  if released > 0 then oldest = call('XPENDING', KEYS[1], 'group', '-', '+', 1, 'released')[1][1] end
  for _, group in ipairs(call('XINFO', 'GROUPS', KEYS[1])) do
    local facts = {}
    for i = 1, #group, 2 do facts[group[i]] = group[i + 1] end
    local next = call('XRANGE', KEYS[1], '(' .. facts['last-delivered-id'], '+', 'COUNT', 1)[1]
    if next and not oldest then oldest = next[1] end
  end
end
local age = oldest and math.max(0, now - tonumber(string.match(oldest, '^(%d+)-'))) or -1
return {length - held + released, held - released, call('ZCARD', KEYS[2]), call('XLEN', KEYS[3]), age}
