"""A scheduler whose epoch is over changes nothing any more."""

from __future__ import annotations

import asyncio

import pytest
from echo_workers import SETTINGS, echo_workers, request, submit, until_final
from redis.asyncio import Redis

from services.scheduler.registrations import Registrations
from services.scheduler.service import SchedulerService
from shared import keys
from shared.errors import EpochEndedError
from shared.messages import BeginEpoch, CommitRefused, ImageDecoded
from shared.records import Commit, Outcome, Records, Retention
from shared.streams import Streams, Writer, script

OLD, NEW = 5, 6
WORK = keys.work("w")


async def contents(redis: Redis) -> dict[bytes, bytes]:
    return {key: await redis.dump(key) async for key in redis.scan_iter()}


@pytest.mark.parametrize(
    "write",
    [
        lambda redis: Records(redis, epoch=OLD).begin_attempt("a", "5-1"),
        lambda redis: Records(redis, epoch=OLD).fail("a", code="c", reason="r"),
        lambda redis: Records(redis, Retention(image_budget_bytes=0), OLD).make_room(),
        lambda redis: Streams(redis, epoch=OLD).send_to_workers([(WORK, BeginEpoch(epoch=OLD))]),
        lambda redis: Streams(redis, epoch=OLD).delete(keys.REQUESTS, ["1-1"]),
        lambda redis: Streams(redis, epoch=OLD).bury(keys.REQUESTS, "1-1", {b"r": b"a"}, "r"),
        lambda redis: Registrations(redis, Writer(redis, OLD)).forget("w"),
        lambda redis: Writer(redis, OLD).write(("SET", keys.STATUS, "x")),
    ],
)
async def test_no_write_of_an_older_epoch_is_taken(redis: Redis, write) -> None:
    await submit(redis, request("a"))
    await redis.xadd(WORK, {"m": ""})
    await redis.set(keys.worker("w"), "registered")
    await redis.zadd(keys.IMAGES, {"image": 1})
    await redis.set(keys.EPOCH, NEW)
    before = await contents(redis)
    with pytest.raises(EpochEndedError):
        await write(redis)
    assert await contents(redis) == before


async def test_an_attempt_of_a_newer_epoch_is_kept(redis: Redis) -> None:
    await submit(redis, request("a"))
    assert await Records(redis, epoch=NEW).begin_attempt("a", "6-1")
    await redis.set(keys.EPOCH, OLD)  # as after a restart of Redis that has lost its last second
    assert not await Records(redis, epoch=OLD).begin_attempt("a", "5-1")
    assert await redis.hget(keys.request("a"), "attempt") == b"6-1"


async def test_an_attempt_named_again_counts_once(redis: Redis) -> None:
    await submit(redis, request("a"))
    for _ in range(2):
        assert await Records(redis, epoch=OLD).begin_attempt("a", "5-1")
    record = await Records(redis).read("a")
    assert record
    assert record.num_attempts == 1


async def test_a_deposed_scheduler_ends_and_leaves_the_next_ones_lease(redis: Redis) -> None:
    service = SchedulerService(redis, SETTINGS)
    scheduler = asyncio.create_task(service.run())
    async with asyncio.timeout(10):
        while not await redis.exists(keys.STATUS):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await redis.delete(keys.SCHEDULER_LEASE)  # as after a long pause
    begin = script(redis, "begin_epoch")
    async with asyncio.timeout(10):
        while not await begin(keys=[keys.SCHEDULER_LEASE], args=["the next", 60_000]):
            await redis.delete(keys.SCHEDULER_LEASE)
    async with asyncio.timeout(10):
        with pytest.raises(EpochEndedError):
            await scheduler
    assert await redis.get(keys.SCHEDULER_LEASE) == b"the next"


async def test_a_scheduler_that_leaves_gives_back_its_own_lease_only(redis: Redis) -> None:
    release = script(redis, "release_lease")
    await redis.set(keys.SCHEDULER_LEASE, "the next")
    assert await release(keys=[keys.SCHEDULER_LEASE], args=["mine"]) == 0
    assert await release(keys=[keys.SCHEDULER_LEASE], args=["the next"]) == 1


async def test_a_commit_that_lost_is_told_to_the_scheduler(redis: Redis) -> None:
    records = Records(redis)
    await submit(redis, request("a"))
    await records.begin_attempt("a", "2-1")
    decoded = ImageDecoded(
        incarnation="vae", request_id="a", attempt="1-1", decode_ms=1.0, transport="shm"
    )
    outcome = Outcome(content_type="image/png", size_bytes=1, seed=1)
    assert not await records.commit(Commit(decoded=decoded, image=b"x", outcome=outcome))
    [entry] = await Streams(redis).read({keys.SCHEDULER: "0"}, count=2)
    assert entry.message == CommitRefused(incarnation="vae", request_id="a", attempt="1-1")


async def test_a_request_that_is_final_already_is_given_up(redis: Redis) -> None:
    """Though the scheduler has not heard of it: the store refuses the attempt."""
    service = SchedulerService(redis, SETTINGS)
    scheduler = asyncio.create_task(service.run())
    try:
        await submit(redis, request("a"))
        async with asyncio.timeout(10):
            while "a" not in getattr(service, "_core", service).__dict__.get("requests", {}):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await redis.hset(keys.request("a"), "state", "cancelled")
        async with echo_workers(redis), asyncio.timeout(10):
            while await redis.xlen(keys.REQUESTS):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await submit(redis, request("b"))
            assert (await until_final(redis, "b")).state == "done"
    finally:
        service.stop()
        await scheduler
