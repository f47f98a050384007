"""The real services for benchmarks that compare policies: the workers stay, the scheduler changes.

Redis, gateway and workers are started as `synerdiff up` starts them; only the scheduler is ended
and started again, with another policy, so that every policy has the same warm workers. Traces of
the simulator's arrivals are played over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import aiohttp

from bench.server import connect, private_server
from launch.client import GatewayError, is_ready
from launch.stack import WORKER_ENVIRONMENT, Stack, StackOptions, prepare_stack
from launch.supervisor import Service
from services.scheduler.simulation.arrivals import Arrival, Mix, make_arrivals
from shared import codec
from shared.messages import MeasureSlot, SlotMeasured
from shared.store import keys
from shared.store.registrations import readable_workers

START_TIMEOUT_S: Final = 600.0
SLOT_WINDOW_MS: Final = 1_000.0
NUM_TO_WARM_UP: Final = 40
WARM_UP_SEED: Final = 99
PROMPTS: Final = ("red apple", "cat face", "rocket", "sunflower", "pizza")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request of a trace; seconds after the trace's start."""

    submitted_s: float
    finished_s: float
    num_steps: int
    is_guided: bool
    num_skipped: int
    """Of its steps."""

    @property
    def latency_s(self) -> float:
        """Return the time from the request to its answer, as the client sees it."""
        return self.finished_s - self.submitted_s

    @property
    def num_rows(self) -> int:
        """Return the UNet rows that its steps took."""
        return self.num_steps * (2 if self.is_guided else 1) - self.num_skipped


def throughput_per_s(served: Sequence[Served]) -> float:
    """Return the pictures a second from the first request to the last answer."""
    first = min(request.submitted_s for request in served)
    return len(served) / (max(request.finished_s for request in served) - first)


class RealStack:
    """Running workers and gateway; use `real_stack`."""

    def __init__(self, stack: Stack, redis_url: str, folder: Path) -> None:
        self._stack = stack
        self._redis = connect(redis_url)
        self._folder = folder
        services = {service.name: service for service in stack.services(redis_url, folder)}
        self._scheduler = services.pop("scheduler")
        self._services = list(services.values())
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._epoch = 0

    def start(self, worker_environment: Mapping[str, str]) -> None:
        """Start gateway and workers; `serve_by` waits for them.

        Args:
            worker_environment: Instead of the workers' own.
        """
        for service in self._services:
            environment = dict(service.environment)
            if environment.get("SYNERDIFF_WORKER_ID"):
                for name in WORKER_ENVIRONMENT:
                    environment.pop(name, None)
                environment |= worker_environment
            self._launch(service, environment)

    def slot_ms(self, *, size: str, rows: int, threads: int) -> float:
        """Return the median of slots of dummy rows in the UNet worker. The scheduler is ended.

        Raises:
            GatewayError: The worker did not answer.
        """
        self._end("scheduler")
        height, _, width = size.partition("x")
        self._redis.delete(keys.SCHEDULER)
        command = MeasureSlot(
            epoch=time.time_ns(),
            number=0,
            height=int(height),
            width=int(width),
            rows=rows,
            threads=threads,
            window_ms=SLOT_WINDOW_MS,
        )
        self._redis.xadd(keys.control(self._unet_worker()), {"m": codec.encode(command)})
        deadline = time.monotonic() + START_TIMEOUT_S
        position = b"0"
        while time.monotonic() < deadline:
            for _, entries in self._redis.xread({keys.SCHEDULER: position}, block=200) or []:
                for position, fields in entries:  # noqa: B007 - the last one is where to go on
                    message = codec.decode(fields[b"m"])
                    if isinstance(message, SlotMeasured):
                        return message.step_ms
        raise GatewayError(f"no slot was measured:\n{self._log([])}")

    def _unet_worker(self) -> str:
        """Return the incarnation of a UNet worker that is ready, once there is one."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            names = [keys.worker(name.decode()) for name in self._redis.smembers(keys.WORKERS)]
            for worker in readable_workers(self._redis.mget(names) if names else []):
                if worker.kind == "unet":
                    return worker.incarnation
            time.sleep(0.1)
        raise GatewayError(f"no UNet worker came up:\n{self._log([])}")

    def serve_by(self, policy: str) -> None:
        """End the scheduler and start one with that policy; return once pictures can be made.

        Raises:
            GatewayError: It did not come up.
        """
        self._end("scheduler")
        command = (sys.executable, "-m", "bench.scheduler", policy)
        self._launch(replace(self._scheduler, command=command), self._scheduler.environment)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_serving():
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise GatewayError(f"{dead or policy} did not come up:\n{self._log(dead)}")
            time.sleep(0.1)

    def warm_up(self, policy: str) -> None:
        """Serve by that policy; first some pictures that nobody times, in slots of many sizes.

        The first slot of each size is compiled.
        """
        self.serve_by(policy)
        self.play(
            make_arrivals(
                "backlog", rate=NUM_TO_WARM_UP, duration_s=1, mix=Mix(), seed=WARM_UP_SEED
            )
        )

    def play(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Send every request at its time over HTTP, and return what all of them came to."""
        served = self.play_within(arrivals, limit_s=math.inf, max_late=len(arrivals))
        assert served is not None
        return served

    def play_within(
        self, arrivals: Sequence[Arrival], *, limit_s: float, max_late: int
    ) -> list[Served] | None:
        """Play, but return None as soon as more than `max_late` requests have taken `limit_s`."""
        return asyncio.run(_play(self._stack.url, arrivals, limit_s, max_late))

    def stop(self) -> None:
        """End every process."""
        for name in list(self._processes):
            self._end(name)
        self._redis.close()

    def _is_serving(self) -> bool:
        """Return whether a scheduler newer than the last one sees both workers."""
        payload = self._redis.get(keys.STATUS)
        status = codec.decode_value(payload, dict[str, Any]) if payload else {}
        if not (status.get("unet_workers") and status.get("vae_workers")):
            return False
        if status["epoch"] == self._epoch or not is_ready(self._stack.url):
            return False
        self._epoch = status["epoch"]
        return True

    def _launch(self, service: Service, environment: Mapping[str, str]) -> None:
        with (self._folder / f"{service.name}.log").open("ab") as log:
            self._processes[service.name] = subprocess.Popen(  # noqa: S603 (our own command)
                service.child_command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _end(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()

    def _log(self, names: Sequence[str]) -> str:
        files = [self._folder / f"{name}.log" for name in names or ["scheduler"]]
        return "\n".join(file.read_text()[-2_000:] for file in files if file.exists())


@contextlib.contextmanager
def real_stack(
    *, profile: Path, worker_environment: Mapping[str, str] = WORKER_ENVIRONMENT
) -> Iterator[RealStack]:
    """Run workers of the embedded model and a gateway; the scheduler comes with `serve_by`.

    Args:
        profile: What the schedulers plan by.
        worker_environment: Instead of the workers' own.
    """
    with private_server() as redis_url, tempfile.TemporaryDirectory(prefix="sd-bench-") as name:
        running = RealStack(
            prepare_stack(StackOptions(port=0, profiles=profile.absolute())), redis_url, Path(name)
        )
        try:
            running.start(worker_environment)
            yield running
        finally:
            running.stop()


async def _play(
    url: str, arrivals: Sequence[Arrival], limit_s: float, max_late: int
) -> list[Served] | None:
    loop = asyncio.get_running_loop()
    num_late = 0

    def note_late() -> None:
        nonlocal num_late
        num_late += 1
        if num_late > max_late:
            everything.cancel()

    async def serve(number: int, arrival: Arrival) -> Served:
        await asyncio.sleep(arrival.at_s - (time.perf_counter() - start))
        submitted_s = time.perf_counter() - start
        timer = loop.call_later(limit_s, note_late)
        body = _body(number, arrival)
        async with session.post("/v1/images/generations", json=body) as reply:
            reply.raise_for_status()
            item = (await reply.json())["data"][0]
        timer.cancel()
        return Served(
            submitted_s=submitted_s,
            finished_s=time.perf_counter() - start,
            num_steps=arrival.num_steps,
            is_guided=arrival.guidance_scale > 1,
            num_skipped=len(item["skipped_steps"]),
        )

    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        start = time.perf_counter()
        everything = asyncio.gather(*(serve(*pair) for pair in enumerate(arrivals)))
        try:
            return await everything
        except asyncio.CancelledError:
            if num_late > max_late:
                return None
            raise


def _body(number: int, arrival: Arrival) -> dict[str, Any]:
    return {
        "prompt": random.Random(number).choice(PROMPTS),
        "seed": number,
        "num_inference_steps": arrival.num_steps,
        "guidance_scale": arrival.guidance_scale,
        "guidance_skip": arrival.guidance_skip,
        "sampler": "ddim",
        "response_format": "url",
    }
