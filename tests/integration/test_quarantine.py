"""Whatever lies in Redis, the scheduler goes on, and serves the next good request."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from echo_workers import SETTINGS, echo_workers, request, submit, until_final
from redis.asyncio import Redis

from services.scheduler.service import SchedulerService
from shared import codec, keys, metrics
from shared.messages import (
    DenoiseSlot,
    RequestFinished,
    RowReport,
    SlotDenoised,
)
from shared.records import Records

Poison = Callable[[Redis], Awaitable[Any]]

BAD = request("bad")


def payload(**changes: Any) -> bytes:
    """A `GenerateImage` with some fields changed, also to what none can hold."""
    fields = msgpack.unpackb(codec.encode(BAD))
    for name, value in changes.items():
        (fields["parameters"] if name in fields["parameters"] else fields)[name] = value
    return msgpack.packb(fields)


def queued(content: bytes, *, entry_id: str = "*", record: bool = True) -> Poison:
    """An entry in the request stream, and the record that a gateway would have made."""

    async def put(redis: Redis) -> None:
        if record:
            fields = {"state": "queued", "attempt": "", "submitted_at": "1", "request": content}
            await redis.hset(keys.request("bad"), mapping=fields)
        await redis.xadd(keys.REQUESTS, {"m": content}, id=entry_id)

    return put


def said(content: bytes) -> Poison:
    """An entry in the scheduler's stream."""
    return lambda redis: redis.xadd(keys.SCHEDULER, {"m": content})


def holds(key: str, value: Any) -> Poison:
    """A key with a value that does not belong there."""

    async def put(redis: Redis) -> None:
        await redis.delete(key)
        if isinstance(value, dict):
            await redis.hset(key, mapping=value)
        elif isinstance(value, list):
            await redis.rpush(key, *value)
        else:
            await redis.set(key, value)

    return put


async def record_is_garbage(redis: Redis) -> None:
    garbage = {"state": "queued", "submitted_at": "zz", "request": b"\xff", "attempts": "zz"}
    await redis.hset(keys.request("bad"), mapping={**garbage, "entry": "zz"})
    await queued(payload(), record=False)(redis)


async def record_is_a_string(redis: Redis) -> None:
    await queued(payload())(redis)
    await holds(keys.request("bad"), "x")(redis)


async def was_begun(redis: Redis) -> None:
    fields = {"state": "running", "attempt": "7-1", "submitted_at": "1", "request": payload()}
    await redis.hset(keys.request("bad"), mapping=fields)
    await queued(payload(), record=False)(redis)


async def resume_is_garbage(redis: Redis) -> None:
    await redis.hset(keys.resume("bad", "7-1"), "step", "zz")
    await was_begun(redis)


async def latents_are_garbage(redis: Redis) -> None:
    await redis.hset(keys.latents("bad", "7-1"), "m", b"\xff")
    await was_begun(redis)


async def latents_are_a_string(redis: Redis) -> None:
    await redis.set(keys.latents("bad", "7-1"), "x")
    await was_begun(redis)


async def registered(redis: Redis, content: bytes) -> None:
    await redis.sadd(keys.WORKERS, "w-old")
    await redis.set(keys.worker("w-old"), content)


SLOT = DenoiseSlot(epoch=1, seq=1, kind="alone", threads=0, rows=())
REPORT = RowReport(request_id="bad", attempt="1-1", has_run=True, next_step_index=1)
DENOISED = SlotDenoised(incarnation="g0-unet", epoch=1, seq=1, duration_ms=1.0, rows=(REPORT,))

FAILS: dict[str, Poison] = {
    "a priority that is infinite": queued(payload(priority=math.inf)),
    "a negative width": queued(payload(width=-8)),
    "no steps": queued(payload(num_inference_steps=0)),
    "a guidance scale that is no number": queued(payload(guidance_scale=math.nan)),
    "a prompt that is no text": queued(payload(prompt=["a"])),
    "parameters nested deeply": queued(
        codec.encode(BAD).replace(b"\xa9a red cat", b"\x91" * 900 + b"\xc0")
    ),
}
"""These name their request, which fails with them."""

NAMELESS: dict[str, Poison] = {
    "a record that is garbage": record_is_garbage,
    "an entry that is no message": queued(b"\xff\x00", record=False),
    "an entry nested too deeply": queued(b"\x91" * 100_000 + b"\xc0", record=False),
    "an entry without a message": lambda redis: redis.xadd(keys.REQUESTS, {"x": "y"}),
    "a message of a wrong kind": queued(
        codec.encode(RequestFinished(request_id="bad", state="done")), record=False
    ),
    "a request without a record": queued(payload(), record=False),
    "an entry of the last possible id": queued(
        payload(), entry_id=f"{2**64 - 1}-{2**64 - 1}", record=False
    ),
    "a record that is a string": record_is_a_string,
    "requests that are a string": holds(keys.REQUESTS, "x"),
    "an unreadable report": said(b"\xc1"),
    "a report of a duration that is no number": said(
        codec.encode(replace(DENOISED, duration_ms=math.nan))
    ),
    "a report of a step before the first": said(
        codec.encode(replace(DENOISED, rows=(replace(REPORT, next_step_index=-9),)))
    ),
    "a report of what was never sent": said(codec.encode(DENOISED)),
    "a command in the scheduler's stream": said(codec.encode(SLOT)),
    "a request in the scheduler's stream": said(payload()),
    "a scheduler's stream that is a string": holds(keys.SCHEDULER, "x"),
    "an epoch that is no number": holds(keys.EPOCH, "abc"),
    "an epoch of forty digits": holds(keys.EPOCH, "9" * 40),
    "an epoch that is a list": holds(keys.EPOCH, ["x"]),
    "a lease that never expires": holds(keys.SCHEDULER_LEASE, "someone"),
    "a lease that is a hash": holds(keys.SCHEDULER_LEASE, {"a": "b"}),
    "a status that is a list": holds(keys.STATUS, ["x"]),
    "a worker's name that is no text": lambda redis: redis.sadd(keys.WORKERS, b"\xff\xfe"),
    "workers that are a string": holds(keys.WORKERS, "x"),
    "a registration of another version": lambda redis: registered(
        redis, msgpack.packb({"worker_id": "w"})
    ),
    "a registration that is no message": lambda redis: registered(redis, b"\xff"),
    "profiles that are garbage": holds(keys.PROFILES, {"x": b"\xff{"}),
    "profiles that are a string": holds(keys.PROFILES, "x"),
    "images that are a string": holds(keys.IMAGES, "x"),
    "sizes of images that are garbage": holds(keys.IMAGE_SIZES, {"total": "many"}),
    "events that are a string": holds(keys.EVENTS, "x"),
    "dead letters that are a string": holds(keys.DEAD_LETTERS, "x"),
    "final records that are a string": holds(keys.FINISHED, "x"),
    "a worker's stream that is a string": holds(keys.work("g0-unet"), "x"),
}

SERVED: dict[str, Poison] = {
    "a resume step that is garbage": resume_is_garbage,
    "latents that are garbage": latents_are_garbage,
    "latents that are a string": latents_are_a_string,
}
"""The request is served all the same, from its first step."""

POISON = FAILS | NAMELESS | SERVED


async def goes_on(redis: Redis, scheduler: asyncio.Task[None]) -> None:
    """A good request is served, nothing else is open, and it is the same scheduler still."""
    await submit(redis, request("good"))
    assert (await until_final(redis, "good")).state == "done"
    async with asyncio.timeout(10):
        while await redis.xlen(keys.REQUESTS):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert not scheduler.done(), scheduler


@pytest.mark.parametrize("when", ["before the start", "while running"])
@pytest.mark.parametrize("name", POISON)
async def test_the_scheduler_outlives(redis: Redis, name: str, when: str) -> None:
    service = SchedulerService(redis, SETTINGS)
    if when == "before the start":
        await POISON[name](redis)
    scheduler = asyncio.create_task(service.run())
    try:
        async with echo_workers(redis):
            if when == "while running":
                await submit(redis, request("first"))
                await until_final(redis, "first")
                await POISON[name](redis)
            await goes_on(redis, scheduler)
            if name in FAILS:
                assert await redis.hget(keys.request("bad"), "state") == b"failed"
            if name in SERVED:
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
            await FAILS["a negative width"](redis)
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
