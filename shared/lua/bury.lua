#!lua flags=allow-oom
-- Park an entry that nobody can handle; the request that it names fails with it.
-- KEYS: its stream, request record ('' for none)
-- ARGV: epoch, entry id, reason, payload, code, record ttl (s), event
-- Returns 1 if a request has failed with it.
local ended = refuse_older(ARGV[1])
if ended then return ended end
bury(KEYS[1], ARGV[3], ARGV[4])
redis.pcall('XDEL', KEYS[1], ARGV[2])
if tonumber(string.match(ARGV[2], '^%d+')) > (now() + 86400) * 1000 then mend_ids(KEYS[1]) end
if KEYS[2] == '' then return 0 end
return finish(KEYS[2], 'failed', ARGV[5], ARGV[3], ARGV[6], ARGV[7])
