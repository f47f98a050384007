#!lua flags=allow-oom
-- Carry out commands, all of them, unless a newer epoch than the writer's has begun. They are small
-- and let open work end, so memory that is full does not stop them.
-- ARGV: epoch ('' for a writer that has none), commands (msgpack array of arrays)
-- Returns the answer to the last one.
local ended = refuse_older(ARGV[1])
if ended then return ended end
local answer
for _, command in ipairs(cmsgpack.unpack(ARGV[2])) do answer = call(unpack(command)) end
return answer
