"""A store that is short of memory: old results make room, and a full one is a pause."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from echo_workers import SETTINGS, echo_workers, request, submit, until_final
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, ResponseError
from redis_server import RedisServer

from services.gateway.fleet import MAX_MEMORY_FRACTION
from services.gateway.fleet_watch import FleetWatch
from services.scheduler.service import SchedulerService
from shared import keys
from shared.messages import ImageDecoded
from shared.patience import StorePatience
from shared.records import Commit, Outcome, Records
from shared.streams import Streams, connect

OUTCOME = Outcome(content_type="image/png", size_bytes=1, seed=1)


async def leave(redis: Redis, num_bytes: int) -> None:
    """Let the server use so much more than now."""
    used = (await redis.info("memory"))["used_memory"]
    await redis.config_set("maxmemory", used + num_bytes)


async def fraction(redis: Redis) -> float:
    """As a gateway sees it."""
    watch = FleetWatch(redis)
    await watch.refresh()
    return watch.fleet.store.memory_fraction


async def draw(redis: Redis, request_id: str, image: bytes) -> None:
    records = Records(redis)
    await submit(redis, request(request_id))
    assert await records.begin_attempt(request_id, "1-1")
    decoded = ImageDecoded(
        incarnation="vae", request_id=request_id, attempt="1-1", decode_ms=1.0, transport="shm"
    )
    assert await records.commit(Commit(decoded=decoded, image=image, outcome=OUTCOME))


async def test_old_pictures_make_room_before_anybody_is_refused(redis: Redis) -> None:
    await leave(redis, 5 << 20)
    for number in range(1_500):
        await draw(redis, f"r{number}", os.urandom(20_000))
        if number % 50 == 0:
            assert await fraction(redis) < MAX_MEMORY_FRACTION
    newest = await Records(redis).read("r1499")
    assert newest
    assert await Records(redis).read_image(newest)
    assert await redis.zcard(keys.IMAGES) > 20
    total = sum([len(await redis.get(key)) for key in await redis.zrange(keys.IMAGES, 0, -1)])
    assert int(await redis.hget(keys.IMAGE_SIZES, "total")) == total


async def test_old_records_make_room_too(redis: Redis) -> None:
    await leave(redis, 2 << 20)
    for number in range(4_000):
        await submit(redis, request(f"r{number}"))
        await Records(redis).fail(f"r{number}", code="c", reason="r")
        if number % 50 == 0:
            await Records(redis).make_room()
            assert await fraction(redis) < MAX_MEMORY_FRACTION
    assert await redis.exists(keys.request("r3999"))
    assert not await redis.exists(keys.request("r0"), keys.job("job-r0"))


async def test_open_requests_stay_whatever_memory_there_is(redis: Redis) -> None:
    await submit(redis, request("open"))
    await draw(redis, "done", b"picture")
    await redis.config_set("maxmemory", 1)
    await Records(redis).make_room()
    assert await redis.exists(keys.request("open"))
    assert not await redis.exists(keys.request("done"))


async def test_work_that_is_open_ends_in_a_full_store_and_all_go_on_after_it(
    redis: Redis, redis_server: RedisServer
) -> None:
    service = SchedulerService(redis, SETTINGS)
    scheduler = asyncio.create_task(service.run())
    client = connect(redis_server.url, is_patient=False)
    try:
        async with echo_workers(redis):
            await submit(redis, request("before"))
            await redis.config_set("maxmemory", 1)
            with pytest.raises(OutOfMemoryError):
                await submit(client, request("refused"))
            waiting = asyncio.create_task(redis.set("x", "y"))
            await asyncio.sleep(3.0)  # beyond heartbeats and leases
            assert not waiting.done()
            assert not await redis.exists(keys.request("refused"))
            await redis.config_set("maxmemory", 0)
            async with asyncio.timeout(10):
                await waiting
                await submit(redis, request("after"))
                assert (await until_final(redis, "after")).state == "done"
            assert not await redis.xlen(keys.REQUESTS)
            assert not scheduler.done()
    finally:
        await redis.config_set("maxmemory", 0)
        service.stop()
        await scheduler
        await client.aclose()


async def test_a_store_that_takes_no_writes_is_waited_out_by_all(redis: Redis) -> None:
    service = SchedulerService(redis, SETTINGS)
    scheduler = asyncio.create_task(service.run())
    try:
        async with echo_workers(redis):
            await submit(redis, request("before"))
            await until_final(redis, "before")
            await redis.config_set("min-replicas-to-write", 1)
            submitting = asyncio.create_task(submit(redis, request("meanwhile")))
            await asyncio.sleep(4.0)  # beyond heartbeats and leases
            assert not submitting.done()
            await redis.config_set("min-replicas-to-write", 0)
            async with asyncio.timeout(10):
                await submitting
                assert (await until_final(redis, "meanwhile")).state == "done"
            assert not scheduler.done()
    finally:
        await redis.config_set("min-replicas-to-write", 0)
        service.stop()
        await scheduler


@pytest.mark.parametrize("words", ["MISCONF Errors writing to the AOF file", "BUSY a script"])
async def test_a_disk_that_is_full_and_a_busy_server_are_waited_out(words: str) -> None:
    answers: list[Exception | str] = [ResponseError(words), ResponseError(words), "taken"]

    async def attempt() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    patience = StorePatience(is_patient=True)
    assert await patience.wait_for(attempt) == "taken"
    assert patience.seconds_since_pause() < 60


async def test_patience_ends_with_the_process(redis: Redis) -> None:
    await redis.config_set("maxmemory", 1)
    redis.patience.end_in(0.5)  # type: ignore[attr-defined]
    with pytest.raises(OutOfMemoryError):
        await redis.set("x", "y")


async def test_dead_letters_are_bounded_by_bytes(redis: Redis) -> None:
    streams = Streams(redis)
    for number in range(400):
        await streams.bury("sd:x", f"{number + 1}-0", {b"m": os.urandom(50_000)}, "big")
    assert await redis.memory_usage(keys.DEAD_LETTERS) <= 3 << 20
    assert await redis.xlen(keys.DEAD_LETTERS) > 50


async def test_a_deadline_is_kept_by_the_stores_clock(redis: Redis) -> None:
    service = SchedulerService(redis, SETTINGS)
    scheduler = asyncio.create_task(service.run())
    try:
        async with echo_workers(redis):
            for name, ahead_s in (("late", -3_600), ("early", 3_600)):
                wrong = time.time() + ahead_s
                await submit(redis, request(name, submitted_at=wrong, deadline_ms=60_000))
                record = await until_final(redis, name)
                assert record.state == "done"
                assert record.finished_at
                assert 0 <= record.finished_at - record.submitted_at < 60
    finally:
        service.stop()
        await scheduler
