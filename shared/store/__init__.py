"""What is kept in Redis: keys, typed streams, records, and the Lua calls that change them."""
