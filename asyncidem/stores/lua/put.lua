-- SET key value NX GET PX for servers before Redis 7.0, and the first claim of a store, which shows whether scripts run.
-- KEYS[1] key; ARGV[1] value, ARGV[2] ttl in milliseconds. Returns false if it was written, else what is there.
local found = redis.call('GET', KEYS[1])
if not found then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
return found
