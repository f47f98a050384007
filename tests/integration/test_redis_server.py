from __future__ import annotations

from redis.asyncio import Redis
from redis_server import RedisServer


async def test_what_the_server_holds_survives_a_restart(
    redis_server: RedisServer, redis: Redis
) -> None:
    await redis.set("a", "1")
    redis_server.stop()
    redis_server.start()
    assert await redis.get("a") == b"1"


async def test_every_test_starts_with_an_empty_server(redis: Redis) -> None:
    assert await redis.dbsize() == 0
