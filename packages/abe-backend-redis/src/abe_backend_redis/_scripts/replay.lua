-- Moves dead letters back to the group, as if they had never been delivered. KEYS: dead letters, stream. ARGV: entry ids. Returns how many.
local moved = 0
for _, id in ipairs(ARGV) do
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    local fields = {}
    for i = 1, #entry[2], 2 do
      local name = entry[2][i]
      if name ~= 'a' and name ~= 'r' and name ~= 'e' and name ~= 't' then fields[#fields + 1] = name; fields[#fields + 1] = entry[2][i + 1] end
    end
    redis.call('XADD', KEYS[2], '*', unpack(fields))
    redis.call('XDEL', KEYS[1], id)
    moved = moved + 1
  end
end
return moved
