-- Moves dead letters back to the group, with no attempts. KEYS: groups, dead letters, stream. ARGV: group, entry ids.
-- Returns how many, and the error that stopped it ('' : none).
if not call('HGET', KEYS[1], ARGV[1]) then return redis.error_reply("MISSING there is no group '" .. ARGV[1] .. "'") end
local moved = 0
for i = 2, #ARGV do
  local entry = call('XRANGE', KEYS[2], ARGV[i], ARGV[i])[1]
  if entry then
    local fields = {}
    for f = 1, #entry[2], 2 do
      local name = entry[2][f]
      if name ~= 'a' and name ~= 'r' and name ~= 'e' and name ~= 't' then fields[#fields + 1] = name; fields[#fields + 1] = entry[2][f + 1] end
    end
    if #fields == 0 then fields = {'i', entry[1]} end
    local done, why = pcall(add, KEYS[3], fields)
    if not done then return {moved, error_text(why)} end
    call('XDEL', KEYS[2], ARGV[i])
    moved = moved + 1
  end
end
return {moved, ''}
