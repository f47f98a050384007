"""Every service is restarted in turn under load: no client sees an error, no request starts again.

A service that is told to stop is started again by `synerdiff up`, as any orchestrator would do it.
"""

from __future__ import annotations

import asyncio
import re
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import openai
import psutil
import pytest
from running_up import Up, is_gone
from tiny_model import make_tiny_model

from cli.pairs import read_workers

NUM_CLIENTS = 8
PACKAGES = ("unet_worker", "vae_worker", "scheduler", "gateway")
NUM_WORKERS = 3
# A sampler without a history of its own, so that a request can move to another worker in the
# middle; and so many steps that most are in the middle at any time.
ORDER = {"sampler": "ddim", "num_inference_steps": 50}


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Up]:
    # Workers with all cores each would keep one another, and the one that starts, from working.
    monkeypatch.setenv("SYNERDIFF_THREADS", "1")
    up = Up.start(make_tiny_model(tmp_path / "tiny"), tmp_path / "d", "--unet-workers", "2")
    yield up
    up.process.kill()
    up.process.wait()


class Load:
    """Clients that ask for one picture after another; an error in any of them is the test's."""

    def __init__(self, url: str) -> None:
        # The official client as it comes, but for its patience with a gateway that is not there.
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=30)
        self._is_over = False
        self.num_pictures = 0

    async def run(self) -> None:
        async with self._client, asyncio.TaskGroup() as group:
            for client in range(NUM_CLIENTS):
                group.create_task(self._keep_asking(client))

    def stop(self) -> None:
        self._is_over = True

    async def more(self, count: int) -> None:
        goal = self.num_pictures + count
        while self.num_pictures < goal:  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    async def _keep_asking(self, client: int) -> None:
        while not self._is_over:
            reply = await self._client.images.generate(
                prompt=f"red cat {client}",
                response_format="b64_json",
                extra_body=ORDER | {"seed": client},
            )
            assert reply.data
            assert reply.data[0].b64_json
            self.num_pictures += 1


async def total(up: Up, name: str) -> float:
    """A counter, over all its labels."""
    async with aiohttp.ClientSession(up.url) as session, session.get("/metrics") as reply:
        samples = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", await reply.text(), re.MULTILINE)
    return sum(map(float, samples))


def processes(up: Up, package: str) -> list[psutil.Process]:
    """A service's processes, the one that has lived longest first."""
    found = [child for child in up.children() if f"services.{package}" in child.cmdline()]
    return sorted(found, key=psutil.Process.create_time)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.05)


def registered(up: Up) -> set[str]:
    return {worker.incarnation for worker in read_workers(f"unix://{up.data_dir}/redis.sock")}


def is_ready(up: Up) -> bool:
    try:
        with urllib.request.urlopen(f"{up.url}/readyz", timeout=3) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


async def restart(up: Up, package: str) -> None:
    """Tell one to stop, the oldest of several; return once another has taken its place."""
    before, old = registered(up), processes(up, package)[0]
    old.send_signal(signal.SIGTERM)
    await until(lambda: is_gone(old))
    if package.endswith("worker"):
        await until(lambda: len(registered(up)) == NUM_WORKERS and registered(up) != before)
    while not await asyncio.to_thread(is_ready, up):  # noqa: ASYNC110
        await asyncio.sleep(0.1)


async def serve_through_restarts(up: Up) -> None:
    load = Load(up.url)
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        for package in PACKAGES:
            await load.more(NUM_CLIENTS)
            if package == "scheduler":
                assert await total(up, "synerdiff_redeliveries_total") == 0
                assert await total(up, "synerdiff_resumed_total") > 0
            await restart(up, package)
        await load.more(2 * NUM_CLIENTS)
        load.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rolling_restart_of_everything_is_seen_by_no_client(up: Up) -> None:
    up.wait_ready()
    asyncio.run(serve_through_restarts(up))
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0, up.said()
    assert "Traceback" not in up.said()
