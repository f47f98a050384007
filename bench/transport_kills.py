"""Hand-overs through shared memory while either side is killed at random moments.

Every tensor travels with its checksum. A hand-over counts when the consumer has read a tensor;
one whose slot had gone by then is lost, which is allowed (the service falls back), unlike a tensor
that is not what was published, or a slot, file or mapping that never comes back.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import torch

from bench.server import PATIENCE_S, connect
from bench.transport_latency import process_context
from shared.codec import decode_value, encode_value
from shared.errors import HandleLostError
from shared.host import SHM_DIRECTORY
from shared.messages import TensorHandle
from shared.tensors.pool import TensorPool
from shared.tensors.pool_file import PREFIX, sweep
from shared.tensors.reader import TensorReader
from shared.tensors.wire import DTYPES, as_bytes

NUM_SLOTS: Final = 16
SLOT_BYTES: Final = 128 << 10
TIMEOUT_S: Final = 0.5
NAP_EVERY: Final = 2_000
"""Once in so many hand-overs the consumer sleeps past the time-out, so that slots go elsewhere."""

_HANDLES, _STOP, _TALLY = "bench:sent", "bench:stop", "bench:tally"
_LAST_STRETCH: Final = 0.95
"""No producer is killed after this part of the run, so that its slots can be counted at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """A handle and the checksum of its tensor's bytes."""

    handle: TensorHandle
    checksum: int


def hand_over_under_fire(
    url: str, *, seed: int, num_hand_overs: int, num_kills: int
) -> dict[str, int]:
    """Hand over until so many tensors were read, killing a side so many times; return counts.

    Returns: `read`, `lost`, `corrupted`, `producers_killed`, `consumers_killed`, and `leaked`, the
    sum of `slots_leaked`, `files_leaked` and `mappings_leaked`.
    """
    with tempfile.TemporaryDirectory(dir=SHM_DIRECTORY, prefix="sd-bench-") as name:
        siege = _Siege(url, Path(name), random.Random(seed))
        try:
            siege.run(num_hand_overs, num_kills)
            return siege.settle()
        finally:
            siege.end()


class _Siege:
    """The two processes, their tally in Redis, and whoever kills them."""

    def __init__(self, url: str, directory: Path, rng: random.Random) -> None:
        self._client = connect(url)
        self._args = (url, directory)
        self._directory = directory
        self._rng = rng
        self._context = process_context()
        self._lives = 0
        self._killed = {"producer": 0, "consumer": 0}
        self._running: dict[str, BaseProcess] = {}

    def run(self, num_hand_overs: int, num_kills: int) -> None:
        """Start both sides and kill them at random counts until enough was handed over."""
        self._start("producer", _produce)
        self._start("consumer", _consume)
        counts = sorted(self._rng.sample(range(num_hand_overs), num_kills))
        for count in counts:
            self._wait_until_read(count)
            time.sleep(self._rng.random() * 1e-3)
            is_late = count > _LAST_STRETCH * num_hand_overs
            if is_late or self._rng.random() < 0.5:  # noqa: PLR2004 (a fair coin)
                self._kill("consumer")
                self._start("consumer", _consume)
            else:
                self._kill("producer")
                self._start("producer", _produce)
        self._wait_until_read(num_hand_overs)

    def settle(self) -> dict[str, int]:
        """Let both sides finish, and return how much did not come back."""
        self._client.set(_STOP, 1)
        for process in self._running.values():
            process.join(PATIENCE_S)
        sweep(self._directory)
        tally = {key.decode(): int(value) for key, value in self._client.hgetall(_TALLY).items()}
        leaks = {
            "slots_leaked": NUM_SLOTS - tally.get("slots_returned", 0),
            "files_leaked": len(list(self._directory.iterdir())),
            "mappings_leaked": tally.get("mappings_left", 1),
        }
        return {
            "read": tally["read"],
            "lost": tally.get("lost", 0),
            "corrupted": tally.get("corrupted", 0),
            "producers_killed": self._killed["producer"],
            "consumers_killed": self._killed["consumer"],
            "leaked": sum(leaks.values()),
            **leaks,
        }

    def end(self) -> None:
        """Leave no process behind."""
        for process in self._running.values():
            process.kill()
            process.join()
        self._client.close()

    def _start(self, side: str, target: Callable[..., None]) -> None:
        self._lives += 1
        process = self._context.Process(target=target, args=(*self._args, self._lives), daemon=True)
        process.start()
        self._running[side] = process

    def _kill(self, side: str) -> None:
        process = self._running[side]
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        self._killed[side] += 1

    def _wait_until_read(self, count: int) -> None:
        """Wait for a count of hand-overs, and see that they go on."""
        read, deadline = -1, time.monotonic() + PATIENCE_S
        while True:
            now_read = int(self._client.hget(_TALLY, "read") or 0)
            if now_read >= count:
                return
            if now_read > read:
                read, deadline = now_read, time.monotonic() + PATIENCE_S
            elif time.monotonic() > deadline:
                raise TimeoutError(f"stuck after {read} of {count} hand-overs")
            time.sleep(2e-3)


def _produce(url: str, directory: Path, life: int) -> None:
    """Publish tensors as fast as slots come back; at the end, count the slots that have."""
    torch.set_num_threads(1)
    client = connect(url)
    sweep(directory)
    owner = f"bench-{life}"
    pool = TensorPool(
        owner, num_slots=NUM_SLOTS, slot_bytes=SLOT_BYTES, timeout_s=TIMEOUT_S, directory=directory
    )
    rng = random.Random(life)
    noise = torch.randint(256, (2 * SLOT_BYTES,), dtype=torch.uint8)
    while not client.exists(_STOP):
        _take_slots_back(client, pool)
        parcels = []
        while (slot := pool.acquire()) is not None:
            tensor = _cut(noise, rng)
            checksum = zlib.crc32(as_bytes(tensor).tobytes())
            handle = pool.publish(slot, tensor, now=time.monotonic())
            parcels.append(encode_value(Parcel(handle=handle, checksum=checksum)))
        if parcels:
            client.rpush(_HANDLES, *parcels)
    deadline = time.monotonic() + PATIENCE_S
    while pool.num_free < NUM_SLOTS and time.monotonic() < deadline:
        _take_slots_back(client, pool)
    client.hset(_TALLY, "slots_returned", pool.num_free)
    pool.close()


def _cut(noise: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Return a tensor of any dtype and size, different from its neighbours."""
    dtype = DTYPES[rng.choice(list(DTYPES))]
    num_bytes = rng.randrange(8, SLOT_BYTES, 8)
    start = rng.randrange(0, SLOT_BYTES, 8)
    return noise[start : start + num_bytes].view(dtype)


def _take_slots_back(client: Any, pool: TensorPool) -> None:
    answer = client.blpop([_releases(pool.owner)], timeout=TIMEOUT_S / 2)
    if answer:
        rest = client.lpop(_releases(pool.owner), NUM_SLOTS) or []
        for release in (answer[1], *rest):
            slot, generation = map(int, release.split(b":"))
            pool.release(slot, generation)
    pool.expire(time.monotonic())


def _consume(url: str, directory: Path, life: int) -> None:
    """Read tensors, check and release them; at the end, count the pools that are still mapped."""
    torch.set_num_threads(1)
    client = connect(url)
    reader = TensorReader(directory=directory)
    rng = random.Random(life)
    while (answer := client.blpop([_HANDLES], timeout=2 * TIMEOUT_S)) or not client.exists(_STOP):
        if not answer:
            continue
        parcel = decode_value(answer[1], Parcel)
        if rng.randrange(NAP_EVERY) == 0:
            time.sleep(TIMEOUT_S)
        outcome = _read(reader, parcel)
        handle = parcel.handle
        with client.pipeline(transaction=False) as pipeline:
            pipeline.hincrby(_TALLY, outcome, 1)
            pipeline.rpush(_releases(handle.owner), f"{handle.slot}:{handle.generation}")
            pipeline.execute()
    _wait_until_pools_are_closed(directory)
    reader.drop_dead()
    client.hset(_TALLY, "mappings_left", _mapped_pools(directory))


def _read(reader: TensorReader, parcel: Parcel) -> str:
    try:
        tensor = reader.read(parcel.handle)
    except HandleLostError:
        return "lost"
    return "read" if zlib.crc32(as_bytes(tensor).tobytes()) == parcel.checksum else "corrupted"


def _wait_until_pools_are_closed(directory: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while any(directory.iterdir()) and time.monotonic() < deadline:
        sweep(directory)
        time.sleep(0.01)


def _mapped_pools(directory: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{directory}/{PREFIX}")


def _releases(owner: str) -> str:
    return f"bench:releases:{owner}"
