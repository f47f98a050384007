"""Stand-ins and child processes for the tests of tensor pools."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

from shared.errors import HandleLostError
from shared.tensors.cuda_ipc import CudaExport
from shared.tensors.pool import TensorPool
from shared.tensors.pool_file import sweep
from shared.tensors.reader import TensorReader

HOST = "this-host"


@dataclass
class FakeGpu:
    """GPU memory and its exports, within one process; it notes what became of each export."""

    device: str = "cuda:fake"
    allocations: list[torch.Tensor] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)
    is_openable: bool = True

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self.allocations.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return self.allocations[-1]

    def export(self, memory: torch.Tensor) -> CudaExport:
        place = next(i for i, known in enumerate(self.allocations) if known is memory)
        self.exports.append("offered")
        return CudaExport(
            storage_handle=bytes([place]) * 66,
            storage_bytes=memory.numel(),
            storage_offset_bytes=512,
            counter_handle=b"/torch_1_2_3",
            counter_offset=len(self.exports) - 1,
            event_handle=bytes(64),
            is_event_needed=True,
        )

    def open(self, export: CudaExport) -> torch.Tensor:
        self._settle(export, "opened")
        if not self.is_openable:
            raise HandleLostError("this one can't be opened")
        memory = self.allocations[export.storage_handle[0]]
        assert memory.numel() == export.storage_bytes
        return memory

    def discard(self, export: CudaExport) -> None:
        self._settle(export, "discarded")

    def finish(self) -> None:
        pass

    def _settle(self, export: CudaExport, fate: str) -> None:
        assert self.exports[export.counter_offset] == "offered", "an export is used exactly once"
        self.exports[export.counter_offset] = fate


def processes() -> ForkServerContext:
    """Real, unrelated processes that start fast: torch is imported once, in their server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shared.tensors.pool"])
    return context


def produce_and_wait(directory: Path, owner: str, parent: Connection) -> None:
    """Publish one tensor, send its handle, wait to be killed."""
    pool = TensorPool(owner, num_slots=2, slot_bytes=4096, host=HOST, directory=directory)
    slot = pool.acquire()
    assert slot is not None
    parent.send(pool.publish(slot, torch.arange(16.0), now=0))
    parent.recv()


def read_and_wait(directory: Path, parent: Connection) -> None:
    """Read one handle, send the sum of its tensor, wait to be killed or told to end."""
    reader = TensorReader(host=HOST, directory=directory)
    parent.send(float(reader.read(parent.recv()).sum()))
    parent.recv()


def reuse_slots_madly(directory: Path, slot_bytes: int, parent: Connection) -> None:
    """Send handle after handle, and take each slot back while its reader is copying.

    Every tensor is full of one number, its handle's generation.
    """
    torch.set_num_threads(1)
    pool = TensorPool("mad", num_slots=1, slot_bytes=slot_bytes, host=HOST, directory=directory)
    turn = 0
    while True:
        turn += 1
        tensor = torch.full((slot_bytes // 4,), float(turn))
        slot = pool.acquire()
        assert slot is not None
        handle = pool.publish(slot, tensor, now=0)
        assert handle.generation == turn
        parent.send(handle)
        if not parent.recv():
            return
        until = time.perf_counter() + turn % 50 * 20e-6
        while time.perf_counter() < until:
            pass
        assert pool.release(slot, turn)
        slot = pool.acquire()
        assert slot is not None
        turn += 1
        pool.publish(slot, torch.full_like(tensor, float(turn)), now=0)
        assert pool.release(slot, turn)


def sweep_madly(directory: Path, parent: Connection) -> None:
    """Sweep without a pause until told to end."""
    parent.send("ready")
    while not parent.poll():
        sweep(directory)
