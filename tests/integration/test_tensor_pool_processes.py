from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
import tensor_pools
import torch
from tensor_pools import HOST

from shared.errors import HandleLostError
from shared.tensors.pool import TensorPool
from shared.tensors.pool_file import sweep
from shared.tensors.reader import TensorReader

NUM_RACES = 300
RACING_S = 60.0
Start = Callable[..., tuple[ForkServerProcess, Connection]]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def start() -> Iterator[Start]:
    context = tensor_pools.processes()
    running: list[ForkServerProcess] = []

    def start(target: Callable[..., None], *args: object) -> tuple[ForkServerProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(*args, theirs), daemon=True)
        process.start()
        theirs.close()
        running.append(process)
        return process, ours

    yield start
    for process in running:
        process.kill()
        process.join()


def kill(process: ForkServerProcess) -> None:
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def mapped_pools(directory: Path) -> int:
    """Files, of each of which a reader maps the whole for reading and the header for writing."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split(maxsplit=5)[5] for line in lines if str(directory) in line})


def test_a_killed_producers_tensor_can_be_read_until_a_sweep_takes_its_file(
    directory: Path, start: Start
) -> None:
    producer, pipe = start(tensor_pools.produce_and_wait, directory, "unet-1")
    handle = pipe.recv()
    reader = TensorReader(host=HOST, directory=directory)
    assert sweep(directory) == (), "its owner lives"
    kill(producer)
    assert torch.equal(reader.read(handle), torch.arange(16.0))
    assert mapped_pools(directory) == 1
    assert sweep(directory) == ("synerdiff-unet-1",)
    assert list(directory.iterdir()) == []
    with pytest.raises(HandleLostError):
        reader.read(handle)
    assert mapped_pools(directory) == 0, "a mapping would keep the memory of a file that is gone"


def test_a_restarted_producer_does_not_answer_for_its_former_life(
    directory: Path, start: Start
) -> None:
    first, pipe = start(tensor_pools.produce_and_wait, directory, "unet-1")
    old = pipe.recv()
    reader = TensorReader(host=HOST, directory=directory)
    reader.read(old)
    kill(first)
    sweep(directory)
    _, pipe = start(tensor_pools.produce_and_wait, directory, "unet-2")
    new = pipe.recv()
    assert (new.slot, new.generation) == (old.slot, old.generation)
    assert torch.equal(reader.read(new), torch.arange(16.0))
    with pytest.raises(HandleLostError):
        reader.read(old)


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_reader_that_ends_takes_nothing_with_it(
    directory: Path, start: Start, is_killed: bool
) -> None:
    pool = TensorPool(
        "unet-1", num_slots=1, slot_bytes=4096, timeout_s=5, host=HOST, directory=directory
    )
    slot = pool.acquire()
    assert slot is not None
    handle = pool.publish(slot, torch.arange(16.0), now=0)
    for _ in range(2):
        consumer, pipe = start(tensor_pools.read_and_wait, directory)
        pipe.send(handle)
        assert pipe.recv() == 120
        if is_killed:
            kill(consumer)
        else:
            pipe.send(None)
            consumer.join()
        assert [path.name for path in directory.iterdir()] == [pool.name]
    assert pool.expire(5) == (handle,), "nobody released it, so its time-out does"
    assert pool.num_free == 1
    pool.close()
    assert list(directory.iterdir()) == []


def test_a_read_beside_a_writer_that_reuses_its_slot_is_whole_or_lost(
    directory: Path, start: Start
) -> None:
    _, pipe = start(tensor_pools.reuse_slots_madly, directory, 1 << 20)
    reader = TensorReader(host=HOST, directory=directory)
    outcomes = {"whole": 0, "lost": 0, "torn": 0}
    ends_at = time.monotonic() + RACING_S
    while sum(outcomes.values()) < NUM_RACES or (
        # Who wins depends on when the two are run, so it goes on until each has won.
        min(outcomes["whole"], outcomes["lost"]) == 0 and time.monotonic() < ends_at
    ):
        handle = pipe.recv()
        pipe.send(True)
        try:
            tensor = reader.read(handle)
        except HandleLostError:
            outcomes["lost"] += 1
        else:
            is_whole = bool(np.all(tensor.numpy() == handle.generation))
            outcomes["whole" if is_whole else "torn"] += 1
    pipe.recv()
    pipe.send(False)
    assert outcomes["torn"] == 0, outcomes
    assert min(outcomes["whole"], outcomes["lost"]) > 0, f"no race was run: {outcomes}"


def test_a_sweeper_never_takes_a_newborn_pool(directory: Path, start: Start) -> None:
    _, pipe = start(tensor_pools.sweep_madly, directory)
    pipe.recv()
    reader = TensorReader(host=HOST, directory=directory)
    for turn in range(100):
        pool = TensorPool(f"unet-{turn}", num_slots=1, slot_bytes=1, host=HOST, directory=directory)
        assert reader.running_seq(pool.name) == -1
        pool.close()
    pipe.send(None)
