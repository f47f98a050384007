"""How long a tensor takes from one process to another, by transport and size.

The clock starts before the producer's first copy and stops when the consumer has a tensor of its
own. What says where the tensor lies goes through Redis for both transports, as it does in the
service; for `inline`, the bytes go along in the same round trip.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from multiprocessing.context import ForkServerContext
from typing import Any, Final

import torch

from bench.server import PATIENCE_S, connect
from shared import codec
from shared.messages import LatentsFinished, TensorHandle
from shared.store import keys
from shared.tensors.pool import TensorPool
from shared.tensors.reader import TensorReader
from shared.tensors.wire import pack_tensor, unpack_tensor

SIZES: Final = {"small": 128 << 10, "large": 4 << 20}
TRANSPORTS: Final = ("shm", "inline")
WARM_UP_ROUNDS: Final = 3

_HANDLES, _ARRIVALS = "bench:handles", "bench:arrivals"


def process_context() -> ForkServerContext:
    """Return what makes unrelated processes that start fast: their server has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shared.tensors.pool", "redis"])
    return context


def measure_latency(url: str, *, seed: int, num_rounds: int) -> dict[str, dict[str, float]]:
    """Return figures by "TRANSPORT_SIZE": median, P99 and spread, in ms.

    Each round hands over each size by each transport, in an order of its own.
    """
    consumer = process_context().Process(target=_consume, args=(url,), daemon=True)
    consumer.start()
    try:
        samples = _produce(url, seed=seed, num_rounds=num_rounds)
    finally:
        consumer.kill()
        consumer.join()
    return {name: _summary(values) for name, values in samples.items()}


def _produce(url: str, *, seed: int, num_rounds: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    client = connect(url)
    owner = f"bench-{time.time_ns()}"
    pool = TensorPool(owner, num_slots=1, slot_bytes=max(SIZES.values()))
    shuffle = random.Random(seed).shuffle
    tensors = {size: torch.randn(num_bytes // 4) for size, num_bytes in SIZES.items()}
    cells = [(transport, size) for transport in TRANSPORTS for size in SIZES]
    samples: dict[str, list[float]] = {f"{transport}_{size}": [] for transport, size in cells}
    try:
        for turn in range(WARM_UP_ROUNDS + num_rounds):
            shuffle(cells)
            for transport, size in cells:
                start = time.perf_counter_ns()
                handle = _send(client, pool, transport, tensors[size])
                arrival = _pop(client, _ARRIVALS)
                pool.release(handle.slot, handle.generation)
                if turn >= WARM_UP_ROUNDS:
                    samples[f"{transport}_{size}"].append((int(arrival) - start) / 1e6)
    finally:
        pool.close()
        client.close()
    return samples


def _send(client: Any, pool: TensorPool, transport: str, tensor: torch.Tensor) -> TensorHandle:
    """Hand a tensor over, say so, and return its handle."""
    key = keys.latents("bench", "1-1")
    with client.pipeline(transaction=False) as pipeline:
        if transport == "shm":
            slot = pool.acquire()
            assert slot is not None
            handle = pool.publish(slot, tensor, now=0)
        else:
            handle = TensorHandle(
                kind="inline",
                pool="",
                owner=pool.owner,
                host=pool.host,
                slot=-1,
                generation=0,
                shape=tuple(tensor.shape),
                dtype="float32",
                inline_key=key,
            )
            pipeline.set(key, pack_tensor(tensor), ex=600)
        message = LatentsFinished(
            incarnation=pool.owner, request_id="bench", attempt="1-1", handle=handle
        )
        pipeline.rpush(_HANDLES, codec.encode(message))
        pipeline.execute()
    return handle


def _consume(url: str) -> None:
    """Take hold of every tensor and answer with the instant at which that was done."""
    torch.set_num_threads(1)
    client = connect(url)
    reader = TensorReader()
    while True:
        message = codec.decode(_pop(client, _HANDLES))
        assert isinstance(message, LatentsFinished)
        handle = message.handle
        if handle.kind == "inline":
            tensor = unpack_tensor(client.get(handle.inline_key), handle.shape, handle.dtype)
        else:
            tensor = reader.read(handle)
        arrival = time.perf_counter_ns()  # CLOCK_MONOTONIC: the same in every process
        assert torch.isfinite(tensor[:: 1 << 12]).all()
        client.rpush(_ARRIVALS, arrival)


def _pop(client: Any, key: str) -> bytes:
    answer = client.blpop([key], timeout=PATIENCE_S)
    if answer is None:
        raise TimeoutError(f"nothing came on {key} for {PATIENCE_S} s; the other side is dead")
    payload: bytes = answer[1]
    return payload


def _summary(samples: list[float]) -> dict[str, float]:
    centiles = statistics.quantiles(samples, n=100, method="inclusive")
    figures = {
        "median_ms": statistics.median(samples),
        "min_ms": min(samples),
        "p10_ms": centiles[9],
        "p90_ms": centiles[89],
        "p99_ms": centiles[98],
        "max_ms": max(samples),
    }
    return {name: round(value, 4) for name, value in figures.items()} | {"samples": len(samples)}
