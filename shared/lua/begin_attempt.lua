#!lua flags=allow-oom
-- Name the attempt that may commit from now on.
-- KEYS: request record   ARGV: epoch, attempt
-- Returns 1, or 0 if the request is final, unknown, or named by a newer epoch.
local ended = refuse_older(ARGV[1])
if ended then return ended end
local record = call('HMGET', KEYS[1], 'state', 'attempt', 'attempts')
if not record[1] or FINAL[record[1]] then return 0 end
if record[1] == 'running' and record[2] == ARGV[2] then return 1 end
local newest = tonumber(string.match(record[2] or '', '^(%d+)-'))
if newest and newest <= 2^53 and ARGV[1] ~= '' and newest > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'state', 'running', 'attempt', ARGV[2],
  'attempts', (tonumber(string.match(record[3] or '', '^%d%d?%d?$') or '0')) + 1)
redis.call('HSETNX', KEYS[1], 'started_at', now())
return 1
