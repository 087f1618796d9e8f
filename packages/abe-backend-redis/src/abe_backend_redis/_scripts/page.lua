-- Returns one bounded page of dead letters. KEYS: groups, dead letters.
-- ARGV: group, first id, last id ('' : the newest now), which fields: all, name (those that the message id is read from), or none.
-- Returns the last id ('' : this is the last page), and the entries.
if ARGV[2] == '-' and not call('HGET', KEYS[1], ARGV[1]) then return redis.error_reply("MISSING there is no group '" .. ARGV[1] .. "'") end
local page, bytes, from, last = {}, 0, ARGV[2], ARGV[3]
if last == '' then
  local newest = call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
  if not newest then return {'', {}} end
  last = newest[1]
end
while #page < MOST do
  local entry = call('XRANGE', KEYS[2], from, last, 'COUNT', 1)[1]
  if not entry then last = ''; break end
  bytes = bytes + size(entry[2])
  if bytes > BYTES and #page > 0 then break end
  from = '(' .. entry[1]
  if ARGV[4] ~= 'all' then
    local found, some = named(entry[2]), {}
    for _, name in ipairs(ARGV[4] == 'name' and {'m', 'i', 'k'} or {}) do
      if found[name] then some[#some + 1] = name; some[#some + 1] = found[name] end
    end
    entry[2] = some
  end
  page[#page + 1] = entry
end
return {last, page}
