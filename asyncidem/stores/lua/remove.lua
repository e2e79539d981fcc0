-- Compare and delete. KEYS[1] key; ARGV[1] expected, ARGV[2] '1' compares whole and '0' the beginning.
-- Returns 1 if it was deleted, else 0.
local found = redis.call('GET', KEYS[1])
if not found then
    return 0
end
if ARGV[2] == '1' then
    if found ~= ARGV[1] then
        return 0
    end
elseif string.sub(found, 1, #ARGV[1]) ~= ARGV[1] then
    return 0
end
return redis.call('DEL', KEYS[1])
