-- Functions for the scripts that move entries; prepended to each of them.
local call = redis.call
local MOST, BYTES = 500, 4 * 1024 * 1024 -- limits for one call, so that no call blocks the server for long
local FIELDS = {'m', 'p', 'k', 'i', 'a', 'r', 'e', 't'}

local function clock()
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function size(fields)
  local bytes = 0
  for i = 1, #fields do bytes = bytes + #fields[i] end
  return bytes
end

local function named(fields)
  local found = {}
  for i = 1, #fields, 2 do found[fields[i]] = fields[i + 1] end
  return found
end

-- Adds an entry. Lua passes some 8,000 arguments at most: of an entry with more, the provider's fields are kept and the others packed into one, x.
local function add(key, fields)
  if #fields <= 2000 then return call('XADD', key, '*', unpack(fields)) end
  local found, kept, others = named(fields), {}, {}
  for _, name in ipairs(FIELDS) do
    if found[name] then kept[#kept + 1] = name; kept[#kept + 1] = found[name] end
    found[name] = false
  end
  for i = 1, #fields, 2 do
    if found[fields[i]] then others[#others + 1] = fields[i]; others[#others + 1] = fields[i + 1] end
  end
  if #others > 0 then kept[#kept + 1] = 'x'; kept[#kept + 1] = cmsgpack.pack(others) end
  return call('XADD', key, '*', unpack(kept))
end

-- Returns the fields of a delayed message: MessagePack after the first '|'. Nil: not in this provider's format.
local function unpacked(member)
  local at = string.find(member, '|', 1, true)
  if not at then return nil end
  local read, fields = pcall(cmsgpack.unpack, string.sub(member, at + 1))
  if not read or type(fields) ~= 'table' or #fields == 0 or #fields % 2 == 1 then return nil end
  for i = 1, #fields do if type(fields[i]) ~= 'string' then return nil end end
  return fields
end

local function error_text(failure) return type(failure) == 'table' and failure.err or tostring(failure) end
