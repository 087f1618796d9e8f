-- Declares a group, and moves the parked messages that it wants to it.
-- One group joins at a time, in steps that examine a bounded number of parked messages; its position is in Redis. The step that finds no
-- more makes the group visible to publishers: what they park meanwhile is examined too, and order is kept. Any declaration continues an
-- interrupted one, so that a crash in the middle strands nothing.
-- KEYS: groups, version, joining, parked, parked:delayed, parked:delayed:passed, the group's stream, its delayed set.
-- ARGV: group, patterns as JSON ('' : its current ones), whether an existing group gets them (1 or 0), the patterns of a new group.
-- Returns '' and the group's patterns when it exists; or the group that is joining: call again, for that group first if it is another.
local group, wanted, change = ARGV[1], ARGV[2], ARGV[3] == '1'
local current = call('HGET', KEYS[1], group)
local joining = named(call('HGETALL', KEYS[3]))
local mine = joining.group == group
local target = change and wanted ~= '' and wanted or mine and joining.patterns or current or wanted ~= '' and wanted or ARGV[4]

local function finish()
  -- Only if it is missing: Redis refuses the command when memory is full, which is when consumers are needed most.
  if redis.pcall('XPENDING', KEYS[7], 'group').err then call('XGROUP', 'CREATE', KEYS[7], 'group', '0', 'MKSTREAM') end
  if current ~= target then
    call('HSET', KEYS[1], group, target)
    local now = call('TIME')
    call('SET', KEYS[2], now[1] .. '.' .. now[2] .. '.' .. group)
  end
  if mine then call('DEL', KEYS[3]) end
  return {'', target}
end
local function exists(first, ...) return call('EXISTS', first, ...) > 0 end

if target == current and not (mine and joining.patterns == target) then return finish() end
if joining.group and not mine then return {joining.group, ''} end
if not exists(KEYS[4], KEYS[5], KEYS[6]) then return finish() end
if target == '["#"]' then
  for _, move in ipairs({{4, 7}, {6, 8}, {5, 8}}) do
    local from, to = KEYS[move[1]], KEYS[move[2]]
    if exists(from) and not exists(to) then call('RENAME', from, to) end
  end
  if not exists(KEYS[4], KEYS[5], KEYS[6]) then return finish() end
end

local function split(text)
  local words = {}
  for word in string.gmatch(text .. '.', '([^.]*)%.') do words[#words + 1] = word end
  return words
end
local patterns = {}
for i, pattern in ipairs(cjson.decode(target)) do patterns[i] = split(pattern) end
local function match(pattern, words)
  -- Tracks the possible states of the pattern after each word; recursion would be exponential in the number of '#'.
  local states = {[1] = true}
  for w = 0, #words do
    local after = {}
    for p = 1, #pattern + 1 do
      if states[p] and pattern[p] == '#' then
        states[p + 1], after[p] = true, true
      elseif states[p] and w < #words and (pattern[p] == '*' or pattern[p] == words[w + 1]) then
        after[p + 1] = true
      end
    end
    if w < #words then states = after end
  end
  return states[#pattern + 1] or false
end
local decided = {}
local function wants(fields)
  local found = named(fields or {})
  local key = found.m and string.match(found.m, '^%[1,"[^"\\]*","([^"\\]*)",')
  if found.m and not key then
    local read, meta = pcall(cjson.decode, found.m)
    key = read and type(meta) == 'table' and type(meta[3]) == 'string' and meta[3]
  end
  key = key or found.k or ''
  if decided[key] == nil then
    local words = split(key)
    decided[key] = false
    for _, pattern in ipairs(patterns) do decided[key] = decided[key] or match(pattern, words) end
  end
  return decided[key]
end

local left, room = MOST, BYTES
local function examined(bytes) left, room = left - 1, room - bytes end

local position, skipped = '-', 0
if mine and joining.patterns == target then position, skipped = joining.position, tonumber(joining.skipped) end
local function each(some, stride, look) -- ten at a time, which bounds what is read in vain
  for i = 1, #some, stride do
    if left <= 0 or room <= 0 then return true end
    look(some[i], some[i + 1])
  end
  return #some > 0
end
local function passed(member, due) -- publishers add nothing to this set: positions in it do not change
  if wants(unpacked(member)) then call('ZADD', KEYS[8], due, member); call('ZREM', KEYS[6], member) else skipped = skipped + 1 end
  examined(#member)
end
local function delayed(member, due)
  if wants(unpacked(member)) then call('ZADD', KEYS[8], due, member)
  else call('ZADD', KEYS[6], due, member); skipped = skipped + 1 end
  call('ZREM', KEYS[5], member)
  examined(#member)
end
local function waiting(entry)
  if wants(entry[2]) then add(KEYS[7], entry[2]); call('XDEL', KEYS[4], entry[1]) end
  position = '(' .. entry[1]
  examined(size(entry[2]))
end
local function in_budget() return left > 0 and room > 0 end
while in_budget() and each(call('ZRANGE', KEYS[6], skipped, skipped + 9, 'WITHSCORES'), 2, passed) do end
while in_budget() and each(call('ZRANGE', KEYS[5], 0, 9, 'WITHSCORES'), 2, delayed) do end
while in_budget() and each(call('XRANGE', KEYS[4], position, '+', 'COUNT', 10), 1, waiting) do end
if not in_budget() then
  call('HSET', KEYS[3], 'group', group, 'patterns', target, 'position', position, 'skipped', skipped)
  return {group, ''}
end
if exists(KEYS[4]) and call('XLEN', KEYS[4]) == 0 then call('DEL', KEYS[4]) end
return finish()
