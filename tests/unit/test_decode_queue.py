"""Which decodes may run, on how many threads, and what UNet workers are told of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import pytest
from image_parameters import PARAMETERS

from services.vae_worker.compute_pool import ComputePool
from services.vae_worker.decode_queue import GRANT_WAIT_S, DecodeQueue
from services.vae_worker.unet_beside import UnetBeside
from shared.messages import CancelDecode, DecodeLatents, GrantChunks, TensorHandle
from shared.tensors.pool import TensorPool
from shared.tensors.reader import TensorReader
from shared.watchdog import Watchdog

HANDLE = TensorHandle(
    kind="inline",
    pool="",
    owner="",
    host="",
    slot=-1,
    generation=0,
    shape=(1, 4, 8, 8),
    dtype="float32",
    inline_key="",
)


def decode(request_id: str, attempt: str = "1-1") -> DecodeLatents:
    return DecodeLatents(
        epoch=1,
        request_id=request_id,
        attempt=attempt,
        handle=HANDLE,
        transport="inline",
        parameters=PARAMETERS,
        skipped_steps=(),
        warnings=(),
        release_to="",
    )


def grant(request_id: str, attempt: str = "1-1", *, seq: int = 0, pool: str = "") -> GrantChunks:
    return GrantChunks(
        epoch=1,
        request_id=request_id,
        attempt=attempt,
        chunks=2,
        threads=1,
        beside_seq=seq,
        pool=pool,
    )


def names(queue: DecodeQueue, now: float = 0.0, running_seq: int = 0) -> list[str]:
    runnable = queue.runnable(now, lambda grant: grant.beside_seq <= running_seq)
    return [one.command.request_id for one in runnable]


def test_decodes_run_in_the_order_of_their_arrival_whatever_is_granted_first() -> None:
    queue = DecodeQueue()
    for name in ("a", "b", "c"):
        queue.add(decode(name))
    for name in ("c", "a"):
        queue.grant(grant(name), 0.0)
    assert names(queue) == ["a", "c"]
    queue.begin_run(queue.waiting()[0])
    assert names(queue) == ["c"]


def test_a_grant_waits_for_its_slot_but_not_for_ever() -> None:
    queue = DecodeQueue()
    queue.add(decode("a"))
    queue.grant(grant("a", seq=5), 100.0)
    assert names(queue, now=100.0, running_seq=4) == []
    assert names(queue, now=100.0, running_seq=5) == ["a"]
    assert names(queue, now=100.0 + GRANT_WAIT_S, running_seq=4) == ["a"]


def test_another_attempt_replaces_a_decode_and_the_same_one_does_not() -> None:
    queue = DecodeQueue()
    queue.add(decode("a"))
    queue.grant(grant("a"), 0.0)
    (first,) = queue.waiting()
    queue.begin_run(first)
    queue.add(decode("a"))
    queue.grant(grant("a", "1-2"), 0.0)
    assert not first.is_dropped
    assert len(first.grants) == 1, "a grant for an attempt that is not here"
    queue.add(decode("a", "1-2"))
    assert first.is_dropped
    queue.cancel(CancelDecode(epoch=1, request_id="a", attempt="1-1"))
    queue.grant(grant("a", "1-2"), 0.0)
    queue.end_run(first)
    assert names(queue) == ["a"]
    assert len(queue) == 1


def test_what_a_dropped_decode_holds_is_freed_once_it_does_not_run() -> None:
    closed: list[str] = []

    def chunks() -> Iterator[int]:
        try:
            yield 1
        finally:
            closed.append("a")

    queue = DecodeQueue()
    queue.add(decode("a"))
    queue.grant(grant("a"), 0.0)
    (running,) = queue.waiting()
    running.chunks = chunks()  # type: ignore[assignment]
    next(running.chunks)
    queue.begin_run(running)
    queue.drop_all()
    assert not closed, "a thread may be inside"
    assert len(queue) == 0
    queue.end_run(running)
    assert closed == ["a"]


@pytest.fixture
def pools() -> Iterator[list[ComputePool]]:
    pools: list[ComputePool] = []
    yield pools
    for pool in pools:
        pool.close()


@pytest.mark.parametrize(
    ("shape", "wanted", "num_waiting", "expected"),
    [
        ((2, 2), 2, 1, [2]),
        ((2, 2), 2, 2, [1, 1]),
        ((2, 2), 0, 3, [1, 1]),
        ((2, 2), 1, 1, [1]),
        ((4, 8), 8, 3, [2, 3, 3]),
        ((4, 8), 8, 9, [2, 2, 2, 2]),
        ((4, 8), 1, 4, [1, 1, 1, 1]),
        ((1, 2), 2, 5, [2]),
    ],
)
def test_calls_that_begin_together_share_the_threads(
    pools: list[ComputePool],
    shape: tuple[int, int],
    wanted: int,
    num_waiting: int,
    expected: list[int],
) -> None:
    pool = ComputePool(*shape, Watchdog())
    pools.append(pool)
    given = []
    while pool.has_room and num_waiting:
        threads = pool.threads_for(wanted, num_waiting)
        pool.lend(threads)
        given.append(threads)
        num_waiting -= 1
    assert given == expected


async def test_a_call_gets_a_thread_that_ran_on_as_many(pools: list[ComputePool]) -> None:
    pool = ComputePool(2, 2, Watchdog())
    pools.append(pool)
    wide, narrow = pool.lend(1), pool.lend(1)
    await wide.run("wide", lambda: None, within_s=60, threads=2)
    await narrow.run("narrow", lambda: None, within_s=60, threads=1)
    for order in ((wide, narrow), (narrow, wide)):
        for thread in order:
            pool.take_back(thread)
        assert pool.lend(1) is narrow
        assert pool.lend(2) is wide


async def test_what_runs_alone_leaves_no_room(pools: list[ComputePool]) -> None:
    pool = ComputePool(2, 2, Watchdog())
    pools.append(pool)
    had_room = await pool.run_alone("alone", lambda: pool.has_room, within_s=60, threads=1)
    assert not had_room
    assert pool.is_idle


def test_a_unet_worker_gives_way_until_the_last_of_its_chunks_is_over() -> None:
    pool = TensorPool(f"unet-{uuid.uuid4().hex[:8]}", num_slots=1, slot_bytes=64)
    try:
        beside = UnetBeside(TensorReader())
        first, second = (grant(name, pool=pool.name) for name in ("a", "b"))

        def gives_way() -> bool:
            return pool.has_chunks_beside(time.monotonic_ns())

        beside.begin_chunk(first)
        beside.begin_chunk(second)
        beside.end_chunk(first, is_last=True)
        assert gives_way()
        beside.end_chunk(second, is_last=True)
        assert not gives_way()
    finally:
        pool.close()
    beside.begin_chunk(first)  # a pool that is gone is nobody's trouble
    assert beside.has_begun(grant("a", seq=9, pool=pool.name))
