-- Accept a job: its record, one record per image, one entry per image in the request stream.
-- KEYS: job, request stream, one request record per image
-- ARGV: max open requests, record ttl (s), now, job fields (msgpack), then per image: id, GenerateImage
-- Returns {1, open}: accepted; {0, open}: this job was accepted before; {-1, open}: full.
local open = redis.call('XLEN', KEYS[2])
if redis.call('EXISTS', KEYS[1]) == 1 then return {0, open} end
local images = #KEYS - 2
if open + images > tonumber(ARGV[1]) then return {-1, open} end
redis.call('HSET', KEYS[1], 'job', ARGV[4], 'submitted_at', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[2])
for i = 1, images do
  local payload = ARGV[4 + 2 * i]
  local entry = redis.call('XADD', KEYS[2], '*', 'm', payload)
  redis.call('HSET', KEYS[2 + i], 'state', 'queued', 'attempt', '', 'entry', entry,
    'submitted_at', ARGV[3], 'request', payload)
end
return {1, open + images}
