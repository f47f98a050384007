#!lua
-- Accept a job: its record, one record per image, one entry per image in the request stream. The one
-- script that a full memory refuses.
-- KEYS: job, one request record per image
-- ARGV: max open requests, record ttl (s), job fields (msgpack), then per image: id, GenerateImage
-- Returns {1, open}: accepted; {0, open}: this job was accepted before; {-1, open}: full.
local open = call('XLEN', REQUESTS)
if redis.call('EXISTS', KEYS[1]) == 1 then return {0, open} end
local images = #KEYS - 1
if open + images > tonumber(ARGV[1]) then return {-1, open} end
redis.call('HSET', KEYS[1], 'job', ARGV[3], 'left', images, 'submitted_at', now())
redis.call('EXPIRE', KEYS[1], ARGV[2])
for i = 1, images do
  local name, payload = ARGV[2 + 2 * i], ARGV[3 + 2 * i]
  -- "r" names the request even where nobody can read the rest.
  local entry = call('XADD', REQUESTS, '*', 'm', payload, 'r', name)
  redis.call('HSET', KEYS[1 + i], 'state', 'queued', 'attempt', '', 'entry', entry,
    'submitted_at', now(), 'request', payload, 'job', KEYS[1])
end
return {1, open + images}
