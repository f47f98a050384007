"""A start without a profile: requests are served while the workers are measured side by side."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from running_services import Stack, num_done, stack

from shared import codec, metrics
from shared.store import keys

NUM_PICTURES = 12
NUM_STEPS = 20


def is_complete() -> bool:
    return any(
        sample.value for family in metrics.PROFILE_COMPLETE.collect() for sample in family.samples
    )


async def source(running: Stack) -> str:
    """Of the UNet worker's profile, once the scheduler says."""
    async with asyncio.timeout(60):
        while True:
            payload = await running.redis.get(keys.STATUS)
            status: dict[str, Any] = codec.decode_value(payload, dict) if payload else {}
            if status.get("profiles"):
                return str(next(iter(status["profiles"].values())))
            await asyncio.sleep(0.05)


async def test_without_a_profile_requests_are_served_and_overlap_is_learnt(
    redis: Redis, tiny_model_folder: Path
) -> None:
    metrics.PROFILE_COMPLETE.clear()
    async with stack(redis, tiny_model_folder) as running:
        first = running.scheduler(policy="synerdiff")
        await running.unet("u0")
        await running.vae("v0")
        await running.submit(NUM_PICTURES, num_steps=NUM_STEPS)
        assert not is_complete()
        await running.until(lambda records: num_done(records) == NUM_PICTURES)
        assert [record.num_attempts for record in await running.records()] == [1] * NUM_PICTURES
        async with asyncio.timeout(60):
            while not is_complete():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await source(running) == "calibrated"

        # The next scheduler has it from the start.
        await first.leave()
        await redis.delete(keys.STATUS)
        running.scheduler(policy="synerdiff")
        assert await source(running) == "calibrated"
