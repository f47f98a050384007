#!lua flags=allow-oom
-- Name the attempt that may commit from now on.
-- KEYS: request record   ARGV: attempt, now
-- Returns 1, or 0 if the request is final or unknown.
local state = redis.call('HGET', KEYS[1], 'state')
if not state or state == 'done' or state == 'failed' or state == 'cancelled' then return 0 end
redis.call('HSET', KEYS[1], 'state', 'running', 'attempt', ARGV[1])
redis.call('HSETNX', KEYS[1], 'started_at', ARGV[2])
redis.call('HINCRBY', KEYS[1], 'attempts', 1)
return 1
