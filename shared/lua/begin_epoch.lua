#!lua flags=allow-oom
-- Take the lease and begin an epoch, in one: whoever has taken it has the newest epoch.
-- KEYS: lease   ARGV: token, lease (ms)
-- Returns the epoch, or 0 while another scheduler is in charge.
local holder = call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  -- A lease that never expires is nobody's: the one in charge would have renewed it within this.
  if redis.call('PTTL', KEYS[1]) < 0 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
  return 0
end
local epoch = math.max((stored_epoch() or 0) + 1, math.floor(now() * 1000))
redis.call('SET', EPOCH, string.format('%.0f', epoch))
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
-- What workers said to an earlier scheduler is moot: they are asked what they hold.
redis.call('DEL', SCHEDULER)
return epoch
