#!lua flags=allow-oom
-- Delete a lost worker's registration and streams.
-- KEYS: worker, its work stream, its control stream
-- ARGV: epoch, incarnation, 'lapsed' to leave one alone that is registered
-- Returns 1, or 0 if it was left alone.
local ended = refuse_older(ARGV[1])
if ended then return ended end
if ARGV[3] == 'lapsed' and redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
call('SREM', WORKERS, ARGV[2])
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
return 1
