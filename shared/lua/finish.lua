#!lua flags=allow-oom
-- Make a request final without an image: failed or cancelled.
-- KEYS: request record
-- ARGV: epoch ('' for a gateway), state, code, reason, record ttl (s), event,
--       message to the scheduler ('' for none)
-- Returns 1, or 0 if it is final already or unknown.
local ended = refuse_older(ARGV[1])
if ended then return ended end
local changed = finish(KEYS[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6])
if changed == 1 and ARGV[7] ~= '' then call('XADD', SCHEDULER, '*', 'm', ARGV[7]) end
return changed
