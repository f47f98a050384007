-- Keep a worker registered; the first beat, and the first after a lapse, introduces it.
-- KEYS: worker, workers, scheduler stream, worker's work stream, worker's control stream
-- ARGV: WorkerInfo (msgpack), ttl (ms), WorkerRegistered, incarnation
-- Returns 1 if it was introduced.
local is_new = redis.call('EXISTS', KEYS[1]) == 0
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if not is_new then return 0 end
for _, key in ipairs({KEYS[4], KEYS[5]}) do
  if redis.call('EXISTS', key) == 0 then
    redis.call('XDEL', key, redis.call('XADD', key, '*', 'm', ''))
  end
end
redis.call('SADD', KEYS[2], ARGV[4])
redis.call('XADD', KEYS[3], '*', 'm', ARGV[3])
return 1
