-- Write again what time a key has left, so that a WAIT behind it covers all that was written before. KEYS[1] key; ARGV[1]
-- how the value begins. Returns 1, or 0 if another value is there, or none, or one that is about to expire.
local found = redis.call('GET', KEYS[1])
if not found or string.sub(found, 1, #ARGV[1]) ~= ARGV[1] then
    return 0
end
local left = redis.call('PTTL', KEYS[1])
if left < 1 then
    return 0
end
return redis.call('PEXPIRE', KEYS[1], left)
