-- Makes a group exist, with the parked messages that it wants.
-- One group joins at a time, in steps that look at a bounded number of parked messages; where it stands is in Redis. It becomes a group to
-- publishers in the step that finds nothing left to look at: what they park meanwhile is looked at too, and order is kept. Whoever
-- declares goes on where another left off, so that a crash in the middle strands nothing.
-- KEYS: groups, version, joining, parked, parked:delayed, parked:delayed:passed, the group's stream, its delayed set.
-- ARGV: group, patterns as JSON ('' : those that it has), whether an existing group gets them (1 or 0), the patterns of a new group.
-- Returns '' and the group's patterns when it exists; or the group that is joining: call again, for that group first if it is another.
local group, wanted, change = ARGV[1], ARGV[2], ARGV[3] == '1'
local current = call('HGET', KEYS[1], group)
local joining = named(call('HGETALL', KEYS[3]))
local mine = joining.group == group
local target = change and wanted ~= '' and wanted or mine and joining.patterns or current or wanted ~= '' and wanted or ARGV[4]

local function finish()
  -- Only where it is missing: Redis refuses this command when memory is full, and then consumers are needed most.
  if redis.pcall('XPENDING', KEYS[7], 'group').err then call('XGROUP', 'CREATE', KEYS[7], 'group', '0', 'MKSTREAM') end
  if current ~= target then
    call('HSET', KEYS[1], group, target)
    local now = call('TIME')
    call('SET', KEYS[2], now[1] .. '.' .. now[2] .. '.' .. group)
  end
  if mine then call('DEL', KEYS[3]) end
  return {'', target}
end
local function there(first, ...) return call('EXISTS', first, ...) > 0 end

if target == current and not (mine and joining.patterns == target) then return finish() end
if joining.group and not mine then return {joining.group, ''} end
if not there(KEYS[4], KEYS[5], KEYS[6]) then return finish() end
if target == '["#"]' and not there(KEYS[6], KEYS[7], KEYS[8]) then
  if there(KEYS[4]) then call('RENAME', KEYS[4], KEYS[7]) end
  if there(KEYS[5]) then call('RENAME', KEYS[5], KEYS[8]) end
  return finish()
end

local function split(text)
  local words = {}
  for word in string.gmatch(text .. '.', '([^.]*)%.') do words[#words + 1] = word end
  return words
end
local patterns = {}
for i, pattern in ipairs(cjson.decode(target)) do patterns[i] = split(pattern) end
local function match(pattern, words)
  -- The states of the pattern that are possible after each word; '#' would make a recursion exponential.
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
local function wants(fields)
  local found = named(fields or {})
  local key = found.k or ''
  if found.m then
    local read, meta = pcall(cjson.decode, found.m)
    if read and type(meta) == 'table' and type(meta[3]) == 'string' then key = meta[3] end
  end
  local words = split(key)
  for _, pattern in ipairs(patterns) do if match(pattern, words) then return true end end
  return false
end

local left, room = MOST, BYTES
local function looked_at(bytes) left, room = left - 1, room - bytes end
local function take(found, to) call('ZADD', to, found[2], found[1]) end

local position, skipped = '-', 0
if mine and joining.patterns == target then position, skipped = joining.position, tonumber(joining.skipped) end
while left > 0 and room > 0 do -- publishers add nothing to these: places in the set do not move
  local found = call('ZRANGE', KEYS[6], skipped, skipped, 'WITHSCORES')
  if not found[1] then break end
  if wants(unpacked(found[1])) then take(found, KEYS[8]); call('ZREM', KEYS[6], found[1]) else skipped = skipped + 1 end
  looked_at(#found[1])
end
while left > 0 and room > 0 do
  local found = call('ZRANGE', KEYS[5], 0, 0, 'WITHSCORES')
  if not found[1] then break end
  if wants(unpacked(found[1])) then take(found, KEYS[8]) else take(found, KEYS[6]); skipped = skipped + 1 end
  call('ZREM', KEYS[5], found[1])
  looked_at(#found[1])
end
while left > 0 and room > 0 do
  local entry = call('XRANGE', KEYS[4], position, '+', 'COUNT', 1)[1]
  if not entry then break end
  if wants(entry[2]) then add(KEYS[7], entry[2]); call('XDEL', KEYS[4], entry[1]) end
  position = '(' .. entry[1]
  looked_at(size(entry[2]))
end
if left <= 0 or room <= 0 then
  call('HSET', KEYS[3], 'group', group, 'patterns', target, 'position', position, 'skipped', skipped)
  return {group, ''}
end
if there(KEYS[4]) and call('XLEN', KEYS[4]) == 0 then call('DEL', KEYS[4]) end
return finish()
