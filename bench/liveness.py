"""`synerdiff bench liveness`: lives gone wrong, and how long until pictures come again.

Threads that hang, entries that can't be read, a store that is full, more work than there is time
for; each on a stack of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from typing import Annotated, Any, Final

import aiohttp
import psutil
import typer
from redis.exceptions import ResponseError

from bench.hung_thread import NotStoppedError, stopped_thread
from bench.overload import Load
from bench.poison import Poison, Poisons
from bench.report import percentile, write_report
from bench.server import connect, private_server
from launch.private_stack import private_stack
from launch.stack import EMBEDDED_MODEL
from shared.messages import GenerateImage, ImageParameters
from shared.store import keys, streams

MAX_CALL_S: Final = 5.0
REQUEST_TIMEOUT_S: Final = 15.0
HUNG_FOR_S: Final = 120.0
FILLER: Final = "bench:filler"
FILLER_PIECE_BYTES: Final = 4 << 20
OVERLOAD: Final = 5.0
CLIENTS: Final = 24
OUTAGE_S: Final = 30.0


def service_pid(package: str) -> int:
    """Return the process id of the one service of that package that this process has started."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if f"services.{package}" in process.cmdline() and "-P" in process.cmdline()[:2]:
                return process.pid
    raise LookupError(package)


def hung_thread_recoveries_s(pictures: int) -> dict[str, float | None]:
    """Return by worker how long after its bound all pictures were there, None if it can't be tried.

    The compute thread is stopped while pictures are made and stays stopped until they are there.
    """
    recoveries: dict[str, float | None] = {}
    with private_stack(settings={"max_call_s": MAX_CALL_S}) as url:
        for package in ("unet_worker", "vae_worker"):
            asyncio.run(_make_pictures(url, pictures))
            try:
                took_s = asyncio.run(_make_pictures(url, pictures, hung=package))
            except NotStoppedError as error:
                print(f"{package}: {error}")
                recoveries[package] = None
            else:
                recoveries[package] = took_s - MAX_CALL_S
                print(f"{package} hung: all pictures {took_s:.1f} s later")
    return recoveries


async def _make_pictures(url: str, count: int, *, hung: str = "") -> float:
    """Return the seconds until so many pictures were there, a service's compute thread stopped."""
    async with _session(url) as session:

        async def make(seed: int) -> None:
            body = {"prompt": "red apple", "seed": seed, "response_format": "url"}
            async with session.post("/v1/images/generations", json=body) as reply:
                reply.raise_for_status()

        tasks = [asyncio.create_task(make(seed)) for seed in range(count)]
        await asyncio.sleep(0.3)
        with stopped_thread(service_pid(hung)) if hung else contextlib.nullcontext():
            began_at = time.perf_counter()
            async with asyncio.timeout(HUNG_FOR_S):
                await asyncio.gather(*tasks)
            return time.perf_counter() - began_at


def poison_outages() -> tuple[int, list[str]]:
    """Return how many kinds of poison were tried, and after which there was an outage.

    That is where another scheduler had to be started, or no picture came.
    """
    outages = set()
    with private_server() as redis_url, private_stack("--redis-url", redis_url) as url:
        poisons = Poisons(request=_spoiled_request(), worker=_unet_worker(redis_url)).every
        scheduler = service_pid("scheduler")
        for name, poison in poisons.items():
            asyncio.run(_pour(redis_url, poison))
            try:
                asyncio.run(asyncio.wait_for(_make_pictures(url, 1), OUTAGE_S))
            except (aiohttp.ClientError, TimeoutError):
                outages.add(name)
            with contextlib.suppress(LookupError):
                if service_pid("scheduler") == scheduler:
                    continue
                scheduler = service_pid("scheduler")
            outages.add(name)
            print(f"outage: {name}")
    return len(poisons), sorted(outages)


async def _pour(redis_url: str, poison: Poison) -> None:
    """Put some poison into Redis, once what was poured before has been cleared away."""
    async with streams.connect(redis_url) as redis, asyncio.timeout(OUTAGE_S):
        while True:
            try:
                await poison(redis)
            except ResponseError:
                await asyncio.sleep(0.1)
            else:
                return


def _spoiled_request() -> GenerateImage:
    """Return a request that the stack could serve."""
    return GenerateImage(
        request_id="img_spoiled",
        job_id="job_spoiled",
        owner="",
        priority=0,
        deadline_ms=0,
        submitted_at=0.0,
        parameters=ImageParameters(
            prompt="a red apple",
            negative_prompt="",
            seed=1,
            height=128,
            width=128,
            num_inference_steps=4,
            guidance_scale=5.0,
            sampler="ddim",
            guidance_skip="off",
            output_format="png",
            output_compression=100,
            model=EMBEDDED_MODEL.name,
        ),
    )


def _unet_worker(redis_url: str) -> str:
    """Return the incarnation of the stack's UNet worker."""
    redis = connect(redis_url)
    try:
        names: list[str] = [name.decode() for name in redis.smembers(keys.WORKERS)]
        return next(name for name in names if name.startswith("unet"))
    finally:
        redis.close()


def full_store_recovery_s(held_full_s: float) -> float:
    """Return the seconds from a full store's being freed to the next picture."""
    with private_server() as redis_url, private_stack("--redis-url", redis_url) as url:
        redis = connect(redis_url)
        asyncio.run(_make_pictures(url, 4))
        redis.config_set("maxmemory", redis.info("memory")["used_memory"] + (64 << 20))
        with contextlib.suppress(Exception):
            while True:
                redis.append(FILLER, b"x" * FILLER_PIECE_BYTES)
        with contextlib.suppress(Exception):
            while True:
                redis.append(FILLER, b"x" * 1024)
        time.sleep(held_full_s)
        redis.delete(FILLER)
        freed_at = time.perf_counter()
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                asyncio.run(asyncio.wait_for(_make_pictures(url, 1), 5))
                break
        redis.close()
        return time.perf_counter() - freed_at


async def overload(url: str, *, seed: int, duration_s: float, pictures: int) -> dict[str, Any]:
    """Return what a stack answers at five times what it can carry, and before that alone."""
    async with _session(url) as session:
        load = Load(session, seed=seed)
        capacity = await load.capacity(clients=CLIENTS, pictures=pictures)
        answers = await load.open_loop(per_s=OVERLOAD * capacity, duration_s=duration_s)
        errors = await load.retry_after_errors(2 if duration_s < 60 else 5)  # noqa: PLR2004
    num_pictures = answers.num_by_status.get(200, 0)
    return {
        "capacity_per_s": capacity,
        "answers": answers.num_by_status,
        "refusals_without_retry_after": answers.num_without_retry_after,
        "overload_goodput": num_pictures / (capacity * duration_s),
        "latency_p99_s": percentile(answers.latencies_s, 0.99) if num_pictures else None,
        "retry_after_errors": errors,
        "healthz_p99_ms": percentile(answers.health_ms, 0.99),
    }


def _session(url: str) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(
        url, connector=connector, timeout=aiohttp.ClientTimeout(total=None)
    )


def run(
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Less certain, under 50 s.")] = False,
) -> dict[str, float | int | None]:
    """Return how a stack recovers from hanging, poison, a full store and overload.

    Returns: `hung_thread_recovery_s` (the slower of the two workers: from the bound of a call to
    the last picture; null where threads can't be stopped), `poison_kinds`, `poison_outages`,
    `full_store_recovery_s`, `overload_goodput` (pictures answered in time over what capacity
    allowed, at five times capacity), `retry_after_error_median` (of what was promised),
    `healthz_p99_ms` (under that load).
    """
    recoveries = hung_thread_recoveries_s(4 if quick else 24)
    num_poisons, outages = poison_outages()
    full_store_s = full_store_recovery_s(2.0 if quick else 30.0)
    with private_stack(settings={"request_timeout_s": REQUEST_TIMEOUT_S}) as url:
        loaded = asyncio.run(
            overload(
                url,
                seed=seed,
                duration_s=8.0 if quick else 60.0,
                pictures=24 if quick else 240,
            )
        )
    report = {
        "max_call_s": MAX_CALL_S,
        "hung_thread_recovery_s": recoveries,
        "poison_kinds": num_poisons,
        "poison_outages": outages,
        "full_store_recovery_s": full_store_s,
        **loaded,
    }
    write_report("liveness_quick" if quick else "liveness", report)
    tried = [seconds for seconds in recoveries.values() if seconds is not None]
    return {
        "hung_thread_recovery_s": round(max(tried), 2) if tried else None,
        "poison_kinds": num_poisons,
        "poison_outages": len(outages),
        "full_store_recovery_s": round(full_store_s, 2),
        "overload_goodput": round(loaded["overload_goodput"], 3),
        "retry_after_error_median": round(statistics.median(loaded["retry_after_errors"]), 3),
        "healthz_p99_ms": round(loaded["healthz_p99_ms"], 1),
    }
