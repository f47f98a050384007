#!lua flags=allow-oom
-- Let the oldest results go where memory is short.   ARGV: epoch, byte budget of images
local ended = refuse_older(ARGV[1])
if ended then return ended end
make_room(0, ARGV[2])
return 1
