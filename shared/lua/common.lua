-- What the scripts share; `shared.streams.script` puts it ahead of each, with the names of the keys.

local MAX_DEAD_LETTERS = 1000
local MAX_DEAD_LETTER_BYTES = 16384
local MAX_DEAD_LETTERS_BYTES = 2097152
local ROOM = 0.75  -- of maxmemory: beyond it the oldest results make room
local FINAL = {done = true, failed = true, cancelled = true}

-- Park what nobody could handle, with its reason. Bounded by number and by bytes.
local function bury(source, reason, payload)
  if redis.call('TYPE', DEAD_LETTERS)['ok'] ~= 'stream' then redis.call('DEL', DEAD_LETTERS) end
  redis.call('XADD', DEAD_LETTERS, 'MAXLEN', MAX_DEAD_LETTERS, '*', 'stream', source,
    'reason', reason, 'size', #payload, 'm', string.sub(payload, 1, MAX_DEAD_LETTER_BYTES))
  local kept = redis.call('XLEN', DEAD_LETTERS)
  while kept > 1 and redis.call('MEMORY', 'USAGE', DEAD_LETTERS) > MAX_DEAD_LETTERS_BYTES do
    kept = math.ceil(kept * 0.9) - 1
    redis.call('XTRIM', DEAD_LETTERS, 'MAXLEN', kept)
  end
end

-- The store's clock, in seconds: the only one that instants are taken from.
local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

-- Park entries whose ids lie days ahead: none could follow them.
local function mend_ids(key)
  local ahead = string.format('%.0f', (now() + 86400) * 1000)
  for _, entry in ipairs(redis.call('XRANGE', key, ahead, '+')) do
    bury(key, 'its id lies in the future', entry[2][2])
    redis.call('XDEL', key, entry[1])
  end
  local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  redis.call('XSETID', key, last and last[1] or '0-1')
end

-- redis.call, but a key that can't take the command is mended first: one of another type is parked.
-- The key is the command's first argument.
local function call(command, key, ...)
  local answer = redis.pcall(command, key, ...)
  if type(answer) ~= 'table' or not answer['err'] then return answer end
  if string.find(answer['err'], 'WRONGTYPE') then
    local kind = redis.call('TYPE', key)['ok']
    local payload = kind == 'string' and redis.call('GET', key) or ''
    redis.call('DEL', key)
    bury(key, 'a ' .. kind .. ' that can not take ' .. command, payload)
  elseif string.find(answer['err'], 'exhausted') then
    mend_ids(key)
  end
  return redis.call(command, key, ...)
end

-- The stored epoch, nil if it is none or garbled.
local function stored_epoch()
  local epoch = tonumber(call('GET', EPOCH) or '')
  if epoch and epoch >= 0 and epoch <= 2^53 then return epoch end
  return nil
end

-- An error if a newer epoch than this one ('' for nobody's) has begun. A garbled one is mended.
local function refuse_older(epoch)
  if epoch == '' then return nil end
  local stored = stored_epoch()
  if stored and stored > tonumber(epoch) then
    return redis.error_reply('EPOCHENDED a newer epoch has begun')
  end
  if stored ~= tonumber(epoch) then redis.call('SET', EPOCH, epoch) end
  return nil
end

local function drop_entry(entry)
  -- pcall: the id comes from a record, which may hold anything.
  if entry then redis.pcall('XDEL', REQUESTS, entry) end
end

-- Note when a record that is final expires; until then it may have to make room.
local function keep_final(record, ttl)
  redis.call('EXPIRE', record, ttl)
  call('ZADD', FINISHED, now() + tonumber(ttl), record)
end

-- Make a request final without an image. Returns 1, or 0 if it is final already or unknown.
local function finish(record, state, code, reason, ttl, event)
  local known = call('HGET', record, 'state')
  if not known or FINAL[known] then return 0 end
  redis.call('HSET', record, 'state', state, 'code', code, 'reason', reason, 'finished_at', now())
  keep_final(record, ttl)
  drop_entry(redis.call('HGET', record, 'entry'))
  call('XADD', EVENTS, 'MAXLEN', '~', 4096, '*', 'm', event)
  return 1
end

-- Sum of the stored images' sizes; a garbled one is counted anew.
local function image_bytes()
  local total = tonumber(call('HGET', IMAGE_SIZES, 'total') or '0')
  if total and total >= 0 then return total end
  total = 0
  for _, key in ipairs(call('ZRANGE', IMAGES, 0, -1)) do
    total = total + (tonumber(redis.call('HGET', IMAGE_SIZES, key) or '0') or 0)
  end
  redis.call('HSET', IMAGE_SIZES, 'total', total)
  return total
end

local function forget_image(key)
  local size = tonumber(call('HGET', IMAGE_SIZES, key) or '0') or 0
  redis.call('HSET', IMAGE_SIZES, 'total', math.max(0, image_bytes() - size))
  redis.call('HDEL', IMAGE_SIZES, key)
  call('ZREM', IMAGES, key)
  redis.call('DEL', key)
end

-- Drop a final record, its image, and its job with the last of its records.
local function forget_record(record)
  local fields = call('HMGET', record, 'job', 'image')
  if fields[2] and call('HEXISTS', IMAGE_SIZES, fields[2]) == 1 then forget_image(fields[2]) end
  redis.call('ZREM', FINISHED, record)
  redis.call('DEL', record)
  local left = fields[1] and redis.call('EXISTS', fields[1]) == 1
    and redis.pcall('HINCRBY', fields[1], 'left', -1)
  if type(left) == 'number' and left <= 0 then redis.call('DEL', fields[1]) end
end

-- Drop the oldest images, where they hold half of `limit` or there is nothing else; otherwise some
-- of the oldest final records. Returns whether there was anything.
local function drop_oldest(limit)
  local records = call('ZRANGE', FINISHED, 0, 7)
  local image = call('ZRANGE', IMAGES, 0, 0)[1]
  if image and (#records == 0 or image_bytes() > limit / 2) then
    forget_image(image)
  else
    for _, record in ipairs(records) do forget_record(record) end
  end
  return image or #records > 0
end

-- Let expired images go, and the oldest results until `size` bytes more fit into the image budget
-- and into what the server may use.
local function make_room(size, budget)
  local instant = now()
  for _, key in ipairs(call('ZRANGEBYSCORE', IMAGES, '-inf', instant)) do forget_image(key) end
  call('ZREMRANGEBYSCORE', FINISHED, '-inf', instant)
  while image_bytes() + size > tonumber(budget) do
    local oldest = redis.call('ZRANGE', IMAGES, 0, 0)[1]
    if not oldest then break end
    forget_image(oldest)
  end
  for _ = 1, 1000 do
    local memory = redis.call('INFO', 'memory')
    local maxmemory = tonumber(string.match(memory, '[\r\n]maxmemory:(%d+)'))
    local used = tonumber(string.match(memory, '[\r\n]used_memory:(%d+)'))
      - tonumber(string.match(memory, 'mem_not_counted_for_evict:(%d+)') or '0')
    local limit = maxmemory * ROOM
    if maxmemory == 0 or used + size <= limit or not drop_oldest(limit) then return end
  end
end
