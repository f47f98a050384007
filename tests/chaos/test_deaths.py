"""Every process dies once while 200 mixed requests run: 200 pictures, none lost, none twice."""

from __future__ import annotations

import asyncio
import io
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from many_requests import count_states, generate
from PIL import Image
from running_up import STOP_TIMEOUT_S, Up, is_gone
from tiny_model import make_tiny_model

from cli.stack import COMPILED_KERNEL_BYTES, NUM_COMPILED_KERNELS
from shared import keys
from shared.streams import connect

NUM_REQUESTS = 200
VICTIMS = (
    "services.unet_worker",
    "services.vae_worker",
    "services.scheduler",
    "services.gateway",
    "redis.sock",
)
"""A word of each process's command line."""
MEMORY_SLACK_BYTES = NUM_COMPILED_KERNELS * COMPILED_KERNEL_BYTES + (100 << 20)
"""A worker fills its cache of compiled kernels, with more or larger ones on some CPUs."""


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up.start(make_tiny_model(tmp_path / "tiny"), tmp_path / "d")
    yield up
    up.process.kill()
    up.process.wait()


def kill(up: Up, victim: str) -> None:
    for child in up.children():
        if victim in " ".join(child.cmdline()):
            child.send_signal(signal.SIGKILL)
            return
    raise AssertionError(f"no {victim} among {[c.cmdline() for c in up.children()]}")


def resident_bytes(up: Up) -> dict[str, int]:
    return {
        " ".join(child.cmdline())[-30:]: child.memory_info().rss
        for child in up.children()
        if "services." in " ".join(child.cmdline())
    }


async def serve_through_deaths(up: Up) -> None:
    timeout = aiohttp.ClientTimeout(total=200)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(up.url, timeout=timeout, connector=connector) as session:
        await generate(session, 10_000)
        before = resident_bytes(up)
        tasks = [asyncio.create_task(generate(session, number)) for number in range(NUM_REQUESTS)]
        for part, victim in enumerate(VICTIMS, start=1):
            while sum(task.done() for task in tasks) < NUM_REQUESTS * part // 8:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            kill(up, victim)
        images = await asyncio.gather(*tasks)
        assert all(Image.open(io.BytesIO(image)).width for image in images)
        # Unfinished leftovers of clients that were cut off finish too.
        async with connect(f"unix://{up.data_dir}/redis.sock") as redis:
            while await redis.xlen(keys.REQUESTS):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            states = await count_states(redis)
            assert states["done"] >= NUM_REQUESTS + 1
            assert set(states) <= {"done", "cancelled"}, states
            # A write that was tried again after its commit leaves a copy; it expires by itself.
            assert all([await redis.ttl(key) > 0 for key in await redis.keys("sd:latents:*")])
        after = resident_bytes(up)
        grown = {name: after[name] - before[name] for name in before.keys() & after.keys()}
        assert all(growth < MEMORY_SLACK_BYTES for growth in grown.values()), grown


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_200_requests_survive_the_death_of_every_process(up: Up) -> None:
    others = {one for one in psutil.Process().children() if one.pid != up.process.pid}
    up.wait_ready()
    asyncio.run(serve_through_deaths(up))
    assert len(up.segments()) == 1
    children = up.children()
    segments = up.segments()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(STOP_TIMEOUT_S) == 0, up.said()
    assert all(is_gone(child) for child in children)
    assert not any(segment.exists() for segment in segments)
    assert set(psutil.Process().children()) <= others
