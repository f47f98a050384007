#!lua flags=allow-oom
-- Make a request final without an image: failed or cancelled.
-- KEYS: request record, request stream, events, scheduler stream
-- ARGV: state, code, reason, now, record ttl (s), event, message to the scheduler ('' for none)
-- Returns 1, or 0 if it is final already or unknown.
local state = redis.call('HGET', KEYS[1], 'state')
if not state or state == 'done' or state == 'failed' or state == 'cancelled' then return 0 end
redis.call('HSET', KEYS[1], 'state', ARGV[1], 'code', ARGV[2], 'reason', ARGV[3],
  'finished_at', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('XDEL', KEYS[2], redis.call('HGET', KEYS[1], 'entry'))
redis.call('XADD', KEYS[3], 'MAXLEN', '~', 4096, '*', 'm', ARGV[6])
if ARGV[7] ~= '' then redis.call('XADD', KEYS[4], '*', 'm', ARGV[7]) end
return 1
