"""Services that are told to stop while pictures are made: all in one process, on a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path

from redis.asyncio import Redis
from running_services import num_done, stack

from shared import metrics

NUM_PICTURES = 24
NUM_STEPS = 100


def forwards() -> float:
    samples = metrics.FORWARDS.collect()[0].samples
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


async def some_forwards(count: int) -> None:
    goal = forwards() + count
    async with asyncio.timeout(120):
        while forwards() < goal:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_workers_that_leave_one_after_another_cost_no_attempt_and_no_step(
    redis: Redis, tiny_model_folder: Path
) -> None:
    resumed_before = metrics.RESUMED._value.get()
    forwards_before = forwards()
    async with stack(redis, tiny_model_folder) as running:
        running.scheduler(max_rows=8)  # so that some have not begun when others are done
        first_unet, first_vae = await running.unet("u0"), await running.vae("v0")
        await running.submit(NUM_PICTURES, num_steps=NUM_STEPS)
        await some_forwards(3 * NUM_STEPS)
        # The only ones of their kind: what they hand back waits for the next.
        await first_unet.leave()
        second_unet = await running.unet("u1")
        await running.until(lambda records: num_done(records) >= 2)
        await first_vae.leave()
        await running.vae("v1")
        await some_forwards(2 * NUM_STEPS)
        await running.unet("u2")
        await second_unet.leave()
        await running.until(lambda records: num_done(records) == NUM_PICTURES)
        assert [record.num_attempts for record in await running.records()] == [1] * NUM_PICTURES
    assert metrics.RESUMED._value.get() > resumed_before
    assert forwards() - forwards_before == NUM_PICTURES * NUM_STEPS


async def test_a_scheduler_that_leaves_loses_nothing_that_workers_hold(
    redis: Redis, tiny_model_folder: Path
) -> None:
    async with stack(redis, tiny_model_folder) as running:
        first = running.scheduler()
        await running.unet("u0")
        await running.vae("v0")
        await running.submit(NUM_PICTURES, num_steps=NUM_STEPS)
        await some_forwards(3 * NUM_STEPS)
        await first.leave()
        running.scheduler()
        await running.until(lambda records: num_done(records) == NUM_PICTURES)
