#!lua flags=allow-oom
-- Keep a worker registered; the first beat, and the first after a lapse, introduces it.
-- KEYS: worker, workers, scheduler stream, worker's work stream, worker's control stream
-- ARGV: WorkerInfo (msgpack), ttl (ms), WorkerRegistered, incarnation
-- Returns 1 if it was introduced.
local is_new = redis.call('EXISTS', KEYS[1]) == 0
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
-- At each beat: the set may have been lost, or parked for what it held.
call('SADD', KEYS[2], ARGV[4])
-- So may the streams, which nobody else makes.
for i = 4, 5 do
  if redis.call('EXISTS', KEYS[i]) == 0 then
    redis.call('XDEL', KEYS[i], redis.call('XADD', KEYS[i], '*', 'm', ''))
  end
end
if is_new then call('XADD', KEYS[3], '*', 'm', ARGV[3]) end
return is_new and 1 or 0
