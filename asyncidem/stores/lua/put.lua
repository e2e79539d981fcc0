-- SET key value NX GET PX for servers before Redis 7.0, and the first claim of a store, which shows whether scripts run.
-- KEYS[1] key; ARGV[1] value, ARGV[2] ttl in milliseconds, ARGV[3] '1' asks for the limits of memory too, '2' only
-- whether the script may run. Returns false if it was written, else what is there; asked for the limits, {that,
-- maxmemory, maxmemory-policy}, as far as the server tells.
if ARGV[3] == '2' then
    return false
end
local found = redis.call('GET', KEYS[1])
if not found then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
if ARGV[3] ~= '1' then
    return found
end
-- INFO, for hosted servers refuse CONFIG GET; a refusal of this one is no error of the claim's.
local said = redis.pcall('INFO', 'memory')
if type(said) ~= 'string' then
    return {found}
end
return {found, string.match(said, 'maxmemory:(%d+)') or '', string.match(said, 'maxmemory_policy:([%w-]+)') or ''}
