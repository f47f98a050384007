"""A start is told service by service, whatever else is registered."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from redis.asyncio import Redis
from scheduler_world import make_worker

from cli.readiness import StartWatch
from launch.stack import Stack
from shared import codec
from shared.store import keys


async def test_an_unreadable_registration_does_not_hide_the_others(
    redis: Redis, tmp_path: Path
) -> None:
    stack = Stack(
        host="127.0.0.1",
        port=1,
        model=tmp_path,
        policy="",
        unet_workers=("unet-0",),
        vae_workers=(),
        environment={},
    )
    watch = await StartWatch.begin(redis, stack)
    worker = replace(make_worker("unet", "unet-0", "u"), threads=1)
    for incarnation, payload in (("a", b"\x81\xa1x\x01"), ("u", codec.encode_value(worker))):
        await redis.sadd(keys.WORKERS, incarnation)
        await redis.set(keys.worker(incarnation), payload)
    async with asyncio.timeout(10):
        announcement = await anext(watch.announcements())
    assert announcement.service == "unet-0"
