-- Publish what handling some entries has begotten, and delete those entries, in one step.
-- KEYS: source stream, destination stream
-- ARGV: number of entries, their ids, then the messages
local count = tonumber(ARGV[1])
for i = 1, count do redis.call('XDEL', KEYS[1], ARGV[1 + i]) end
for i = count + 2, #ARGV do redis.call('XADD', KEYS[2], '*', 'm', ARGV[i]) end
return #ARGV - count - 1
