#!lua flags=allow-oom
-- Commit an image: it loses unless its attempt is current and the request has no final state. Either
-- way the producer's pool slot comes free, and the scheduler hears of it.
-- KEYS: request record, producer's control stream, image, inline latents
-- ARGV: attempt, image bytes, outcome (msgpack), image ttl (s), record ttl (s), byte budget, event,
--       message to the scheduler if it wins, if it loses, release message
-- Returns 1, or 0 if it lost.
if ARGV[10] ~= '' then call('XADD', KEYS[2], 'NOMKSTREAM', '*', 'm', ARGV[10]) end
redis.call('DEL', KEYS[4])
local record = call('HMGET', KEYS[1], 'state', 'attempt', 'entry')
if record[1] ~= 'running' or record[2] ~= ARGV[1] then
  call('XADD', SCHEDULER, '*', 'm', ARGV[9])
  return 0
end

local size = #ARGV[2]
make_room(size, ARGV[6])
redis.call('SET', KEYS[3], ARGV[2], 'EX', ARGV[4])
call('ZADD', IMAGES, now() + tonumber(ARGV[4]), KEYS[3])
redis.call('HSET', IMAGE_SIZES, 'total', image_bytes() + size, KEYS[3], size)

redis.call('HSET', KEYS[1], 'state', 'done', 'image', KEYS[3], 'outcome', ARGV[3],
  'finished_at', now())
keep_final(KEYS[1], ARGV[5])
drop_entry(record[3])
call('XADD', EVENTS, 'MAXLEN', '~', 4096, '*', 'm', ARGV[7])
call('XADD', SCHEDULER, '*', 'm', ARGV[8])
return 1
