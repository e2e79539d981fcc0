-- Compare and set. KEYS[1] key; ARGV[1] expected, ARGV[2] value, ARGV[3] ttl in milliseconds, ARGV[4] '1' compares
-- whole and '0' the beginning, ARGV[5] '1' also writes where the key is absent, ARGV[6] the greatest time left in
-- milliseconds with which it still writes ('' any). Returns {1} if it was written, {0} or {0, what is there} if not.
local found = redis.call('GET', KEYS[1])
if not found then
    if ARGV[5] ~= '1' then
        return {0}
    end
else
    local same
    if ARGV[4] == '1' then
        same = found == ARGV[1]
    else
        same = string.sub(found, 1, #ARGV[1]) == ARGV[1]
    end
    if not same or (ARGV[6] ~= '' and redis.call('PTTL', KEYS[1]) > tonumber(ARGV[6])) then
        return {0, found}
    end
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {1}
