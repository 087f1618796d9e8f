-- Makes a group exist, with the held messages that it wants.
-- KEYS: groups, version, the group's stream, its delayed set, held, held:delayed. ARGV: group, patterns as JSON ('' leaves them alone),
-- where to go on among the held messages, the patterns of a group that is new.
-- Returns 1 when there are more held messages to look at: call it again, from the position returned second.
local call = redis.call
local current = call('HGET', KEYS[1], ARGV[1])
local wanted = ARGV[2] ~= '' and ARGV[2] or current or ARGV[4]

local function split(text)
  local words = {}
  for word in string.gmatch(text .. '.', '([^.]*)%.') do words[#words + 1] = word end
  return words
end
local patterns = {}
for i, pattern in ipairs(cjson.decode(wanted)) do patterns[i] = split(pattern) end
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
  local key = ''
  for i = 1, #fields, 2 do
    if fields[i] == 'k' then key = fields[i + 1] end
    if fields[i] == 'm' then
      local read, meta = pcall(cjson.decode, fields[i + 1])
      key = read and type(meta) == 'table' and type(meta[3]) == 'string' and meta[3] or ''
    end
  end
  local words = split(key)
  for _, pattern in ipairs(patterns) do if match(pattern, words) then return true end end
  return false
end

if call('EXISTS', KEYS[6]) == 1 then
  local held = call('ZRANGE', KEYS[6], 0, -1, 'WITHSCORES')
  for i = 1, #held, 2 do
    local fields = cmsgpack.unpack(string.sub(held[i], string.find(held[i], '|', 1, true) + 1))
    if wants(fields) then call('ZADD', KEYS[4], held[i + 1], held[i]); call('ZREM', KEYS[6], held[i]) end
  end
end
if call('EXISTS', KEYS[5]) == 1 then
  if wanted == '["#"]' and call('EXISTS', KEYS[3]) == 0 then
    call('RENAME', KEYS[5], KEYS[3])
  else
    local some = call('XRANGE', KEYS[5], ARGV[3], '+', 'COUNT', 1000)
    for _, entry in ipairs(some) do
      if wants(entry[2]) then call('XADD', KEYS[3], '*', unpack(entry[2])); call('XDEL', KEYS[5], entry[1]) end
    end
    if #some == 1000 then return '(' .. some[1000][1] end
    if call('XLEN', KEYS[5]) == 0 then call('DEL', KEYS[5]) end
  end
end
-- Only where it is missing: Redis refuses this command when memory is full, and then consumers are needed most.
if redis.pcall('XPENDING', KEYS[3], 'group').err then call('XGROUP', 'CREATE', KEYS[3], 'group', '0', 'MKSTREAM') end
if current ~= wanted then
  call('HSET', KEYS[1], ARGV[1], wanted)
  local now = call('TIME')
  call('SET', KEYS[2], now[1] .. '.' .. now[2] .. '.' .. ARGV[1])
end
return ''
