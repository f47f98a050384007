"""The real CUDA IPC between unrelated processes; needs a GPU, and `--ipc` and `--pid` shared."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch

from shared.errors import HandleLostError
from shared.messages import TensorHandle
from shared.tensors.cuda_ipc import TorchIpc
from shared.tensors.pool import TensorPool
from shared.tensors.pool_file import sweep
from shared.tensors.reader import TensorReader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda", 0)
NUM_VALUES = 64 << 10
NUM_HAND_OVERS = 1_000
LEAK_BYTES = 64 << 20

Start = Callable[..., tuple[SpawnProcess, Connection]]


def produce(directory: Path, owner: str, parent: Connection) -> None:
    """Publish a tensor full of each number received; take back the slot of each handle received."""
    pool = TensorPool(
        owner, num_slots=4, slot_bytes=NUM_VALUES * 4, ipc=TorchIpc(GPU), directory=directory
    )
    while (order := parent.recv()) is not None:
        pool.expire(0)
        if isinstance(order, TensorHandle):
            parent.send(pool.release(order.slot, order.generation))
        else:
            slot = pool.acquire()
            assert slot is not None
            tensor = torch.full((NUM_VALUES,), float(order), device=GPU)
            parent.send(pool.publish(slot, tensor, now=0))
    pool.close()


def consume(directory: Path, parent: Connection) -> None:
    """Answer each handle with the least and the greatest value of its tensor, or why it is lost."""
    reader = TensorReader(ipc=TorchIpc(GPU), directory=directory)
    while (handle := parent.recv()) is not None:
        try:
            tensor = reader.read(handle)
        except HandleLostError as error:
            parent.send(str(error))
        else:
            assert tensor.device == GPU
            parent.send((tensor.min().item(), tensor.max().item()))
    reader.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def start() -> Iterator[Start]:
    context = multiprocessing.get_context("spawn")
    running: list[SpawnProcess] = []

    def start(target: Callable[..., None], *args: object) -> tuple[SpawnProcess, Connection]:
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


def ask(pipe: Connection, question: object) -> object:
    pipe.send(question)
    return pipe.recv()


def end(process: SpawnProcess, pipe: Connection) -> None:
    pipe.send(None)
    process.join(60)
    assert process.exitcode == 0


def kill(process: SpawnProcess) -> None:
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def free_bytes() -> int:
    return torch.cuda.mem_get_info(GPU)[0]


def counter_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("torch_*")}


def wait_for_free_bytes(before: int) -> None:
    deadline = time.monotonic() + 30
    while free_bytes() < before - LEAK_BYTES and time.monotonic() < deadline:
        time.sleep(0.1)
    assert free_bytes() >= before - LEAK_BYTES


def test_a_thousand_hand_overs_arrive_whole_and_leave_nothing(
    directory: Path, start: Start
) -> None:
    free, counters = free_bytes(), counter_files()
    producer, to_producer = start(produce, directory, "unet-1")
    consumer, to_consumer = start(consume, directory)
    previous = None
    for turn in range(NUM_HAND_OVERS):
        handle = ask(to_producer, turn)
        assert ask(to_consumer, handle) == (turn, turn)
        assert ask(to_producer, handle) is True
        if previous:
            assert "generation" in str(ask(to_consumer, previous))
        previous = handle
    end(consumer, to_consumer)
    end(producer, to_producer)
    assert list(directory.iterdir()) == []
    assert counter_files() == counters
    wait_for_free_bytes(free)


def test_a_killed_consumer_costs_its_successor_nothing(directory: Path, start: Start) -> None:
    free = free_bytes()
    producer, to_producer = start(produce, directory, "unet-1")
    handle = ask(to_producer, 7)
    for _ in range(3):
        consumer, to_consumer = start(consume, directory)
        assert ask(to_consumer, handle) == (7, 7)
        kill(consumer)
    consumer, to_consumer = start(consume, directory)
    assert ask(to_consumer, handle) == (7, 7)
    assert ask(to_producer, handle) is True
    end(consumer, to_consumer)
    end(producer, to_producer)
    wait_for_free_bytes(free)


def test_a_killed_producers_handles_are_lost_and_its_successors_are_read(
    directory: Path, start: Start
) -> None:
    free, counters = free_bytes(), counter_files()
    consumer, to_consumer = start(consume, directory)
    for life in range(3):
        producer, to_producer = start(produce, directory, f"unet-{life}")
        handle = ask(to_producer, life)
        assert ask(to_consumer, handle) == (life, life)
        kill(producer)
        assert "dead" in str(ask(to_consumer, handle))
        assert sweep(directory) == (f"synerdiff-unet-{life}",)
    assert counter_files() == counters
    producer, to_producer = start(produce, directory, "unet-last")
    assert ask(to_consumer, ask(to_producer, 9)) == (9, 9)
    end(producer, to_producer)
    end(consumer, to_consumer)
    wait_for_free_bytes(free)
