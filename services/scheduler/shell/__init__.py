"""What the scheduler's service reads from Redis and writes to it."""
