"""Whatever lies in Redis, the scheduler goes on, and serves the next good request."""

from __future__ import annotations

import asyncio

import pytest
from echo_workers import SETTINGS, echo_workers, request, submit, until_final
from redis.asyncio import Redis

from bench.poison import Poisons
from services.scheduler.service import SchedulerService
from shared import keys, metrics
from shared.records import Records

POISONS = Poisons(request=request("bad"), worker="g0-unet")


async def goes_on(redis: Redis, scheduler: asyncio.Task[None]) -> None:
    """A good request is served, nothing else is open, and it is the same scheduler still."""
    await submit(redis, request("good"))
    assert (await until_final(redis, "good")).state == "done"
    async with asyncio.timeout(10):
        while await redis.xlen(keys.REQUESTS):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert not scheduler.done(), scheduler


@pytest.mark.parametrize("when", ["before the start", "while running"])
@pytest.mark.parametrize("name", POISONS.every)
async def test_the_scheduler_outlives(redis: Redis, name: str, when: str) -> None:
    service = SchedulerService(redis, SETTINGS)
    if when == "before the start":
        await POISONS.every[name](redis)
    scheduler = asyncio.create_task(service.run())
    try:
        async with echo_workers(redis):
            if when == "while running":
                await submit(redis, request("first"))
                await until_final(redis, "first")
                await POISONS.every[name](redis)
            await goes_on(redis, scheduler)
            if name in POISONS.failing:
                assert await redis.hget(keys.request("bad"), "state") == b"failed"
            if name in POISONS.harmless:
                assert (await until_final(redis, "bad")).state == "done"
    finally:
        service.stop()
        async with asyncio.timeout(20):
            await scheduler


async def test_what_is_parked_is_counted_and_shown(redis: Redis) -> None:
    before = metrics.DEAD_LETTERS.labels(stream=keys.REQUESTS)._value.get()
    failed = metrics.REQUESTS_FINISHED.labels(state="failed")
    failed_before = failed._value.get()
    service = SchedulerService(redis, SETTINGS)
    scheduler = asyncio.create_task(service.run())
    try:
        async with echo_workers(redis):
            await submit(redis, request("first"))
            await until_final(redis, "first")
            await POISONS.failing["a negative width"](redis)
            await goes_on(redis, scheduler)
            await asyncio.sleep(1.0)  # the next look
    finally:
        service.stop()
        await scheduler
    assert metrics.DEAD_LETTERS.labels(stream=keys.REQUESTS)._value.get() == before + 1
    assert failed._value.get() == failed_before + 1
    assert metrics.DEAD_LETTERS_KEPT._value.get() == 1
    assert metrics.DEAD_LETTERS_BYTES._value.get() > 0
    [(_, letter)] = await redis.xrange(keys.DEAD_LETTERS)
    assert b"width is -8" in letter[b"reason"]


async def test_a_cancelled_request_is_counted(redis: Redis) -> None:
    cancelled = metrics.REQUESTS_FINISHED.labels(state="cancelled")
    before = cancelled._value.get()
    service = SchedulerService(redis, SETTINGS)
    scheduler = asyncio.create_task(service.run())
    try:
        async with asyncio.timeout(10):
            while not await redis.exists(keys.STATUS):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await submit(redis, request("a"))
        assert await Records(redis).cancel("a", reason="gone")
        async with asyncio.timeout(10):
            while cancelled._value.get() == before:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    finally:
        service.stop()
        await scheduler


async def test_a_worker_that_died_while_no_scheduler_ran_is_forgotten(redis: Redis) -> None:
    await redis.sadd(keys.WORKERS, "gone")
    await redis.xadd(keys.work("gone"), {"m": ""})
    service = SchedulerService(redis, SETTINGS)
    scheduler = asyncio.create_task(service.run())
    try:
        async with asyncio.timeout(10):
            while await redis.exists(keys.work("gone")):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert not await redis.sismember(keys.WORKERS, "gone")
    finally:
        service.stop()
        await scheduler
