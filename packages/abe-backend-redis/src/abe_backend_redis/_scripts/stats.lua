-- KEYS: groups, stream, delayed set, dead letters. ARGV: group.
-- Returns waiting, in flight, delayed, dead, and the oldest waiting message's age in ms (-1: none).
local call = redis.call
if not call('HGET', KEYS[1], ARGV[1]) then return redis.error_reply("MISSING there is no group '" .. ARGV[1] .. "'") end
local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local length, pending, released, oldest = call('XLEN', KEYS[2]), 0, 0, nil
if call('EXISTS', KEYS[2]) == 1 then
  local known, summary = pcall(call, 'XPENDING', KEYS[2], 'group')
  if not known then summary = {0} end -- a publisher recreated the stream after its deletion; the next consumer creates the group
  pending = summary[1]
  for _, consumer in ipairs(type(summary[4]) == 'table' and summary[4] or {}) do
    if consumer[1] == 'released' then released = tonumber(consumer[2]) end
  end
  if released > 0 then oldest = call('XPENDING', KEYS[2], 'group', '-', '+', 1, 'released')[1][1] end
  for _, group in ipairs(call('XINFO', 'GROUPS', KEYS[2])) do
    local facts = {}
    for i = 1, #group, 2 do facts[group[i]] = group[i + 1] end
    local next = call('XRANGE', KEYS[2], '(' .. facts['last-delivered-id'], '+', 'COUNT', 1)[1]
    if next and not oldest then oldest = next[1] end
  end
end
local age = oldest and math.max(0, now - tonumber(string.match(oldest, '^(%d+)-'))) or -1
return {length - pending + released, pending - released, call('ZCARD', KEYS[3]), call('XLEN', KEYS[4]), age}
