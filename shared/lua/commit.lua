#!lua flags=allow-oom
-- Commit an image: it loses unless its attempt is current and the request has no final state. Either
-- way the producer's pool slot comes free.
-- KEYS: request record, request stream, events, scheduler stream, producer's control stream,
--       image, images by expiry, image sizes, inline latents
-- ARGV: attempt, image bytes, outcome (msgpack), now, image ttl (s), record ttl (s), byte budget,
--       event, message to the scheduler, release message
-- Returns 1, or 0 if it lost.
if ARGV[10] ~= '' then redis.call('XADD', KEYS[5], 'NOMKSTREAM', '*', 'm', ARGV[10]) end
redis.call('DEL', KEYS[9])
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'entry')
if record[1] ~= 'running' or record[2] ~= ARGV[1] then return 0 end

local function forget(key)
  local size = redis.call('HGET', KEYS[8], key)
  if size then
    redis.call('HDEL', KEYS[8], key)
    redis.call('HINCRBY', KEYS[8], 'total', -tonumber(size))
  end
  redis.call('ZREM', KEYS[7], key)
  redis.call('DEL', key)
end
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[7], '-inf', ARGV[4])) do forget(key) end
local size = #ARGV[2]
local total = tonumber(redis.call('HGET', KEYS[8], 'total') or '0')
while total + size > tonumber(ARGV[7]) do
  local oldest = redis.call('ZRANGE', KEYS[7], 0, 0)
  if #oldest == 0 then break end
  forget(oldest[1])
  total = tonumber(redis.call('HGET', KEYS[8], 'total') or '0')
end
redis.call('SET', KEYS[6], ARGV[2], 'EX', ARGV[5])
redis.call('ZADD', KEYS[7], tonumber(ARGV[4]) + tonumber(ARGV[5]), KEYS[6])
redis.call('HSET', KEYS[8], KEYS[6], size)
redis.call('HINCRBY', KEYS[8], 'total', size)

redis.call('HSET', KEYS[1], 'state', 'done', 'image', KEYS[6], 'outcome', ARGV[3],
  'finished_at', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('XDEL', KEYS[2], record[3])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', 4096, '*', 'm', ARGV[8])
redis.call('XADD', KEYS[4], '*', 'm', ARGV[9])
return 1
