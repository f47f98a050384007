from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tensor_pools import HOST, FakeGpu

from shared.errors import HandleLostError
from shared.messages import TensorHandle
from shared.tensors.cuda_ipc import GpuIpc
from shared.tensors.pool import TensorPool
from shared.tensors.pool_file import sweep
from shared.tensors.reader import TensorReader

NUM_SLOTS = 3
SLOT_BYTES = 64
TIMEOUT_S = 10
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Issued:
    """A handle that was ever given out. expires_at: None once its publication is over."""

    handle: TensorHandle
    tensor: torch.Tensor
    expires_at: int | None


class PoolMachine(RuleBasedStateMachine):
    """A pool and its reader against a list of what was published when."""

    ipc: GpuIpc | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.directory = Path(self.folder.name)
        self.reader = TensorReader(ipc=self.ipc, host=HOST, directory=self.directory)
        self.now = 0
        self.lives = 0

    @initialize()
    def begin(self) -> None:
        self.lives += 1
        self.pool = TensorPool(
            f"unet-{self.lives}",
            num_slots=NUM_SLOTS,
            slot_bytes=SLOT_BYTES,
            timeout_s=TIMEOUT_S,
            ipc=self.ipc,
            host=HOST,
            directory=self.directory,
        )
        self.acquired: list[int] = []
        self.issued: list[Issued] = [] if self.lives == 1 else self.issued

    def live(self) -> list[Issued]:
        return [one for one in self.issued if one.expires_at is not None]

    @rule()
    def acquire(self) -> None:
        slot = self.pool.acquire()
        is_full = len(self.acquired) + len(self.live()) == NUM_SLOTS
        assert (slot is None) == is_full
        if slot is not None:
            assert slot not in self.acquired
            assert slot not in [one.handle.slot for one in self.live()]
            self.acquired.append(slot)

    @precondition(lambda self: self.acquired)
    @rule(dtype=st.sampled_from(DTYPES), size=st.integers(1, SLOT_BYTES // 4), seed=st.integers(0))
    def publish(self, dtype: torch.dtype, size: int, seed: int) -> None:
        tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed % 2**63))
        tensor = tensor.to(dtype)
        handle = self.pool.publish(self.acquired.pop(), tensor, now=self.now)
        self.issued.append(
            Issued(handle=handle, tensor=tensor, expires_at=self.now + TIMEOUT_S),
        )

    @precondition(lambda self: self.acquired)
    @rule(tensor=st.sampled_from([torch.zeros(SLOT_BYTES), torch.zeros(1).double()]))
    def publish_what_does_not_fit(self, tensor: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=r"fit|travel"):
            self.pool.publish(self.acquired.pop(), tensor, now=self.now)

    @precondition(lambda self: self.acquired)
    @rule()
    def abandon(self) -> None:
        self.pool.abandon(self.acquired.pop())

    @precondition(lambda self: self.issued)
    @rule(data=st.data())
    def release_any_handle_ever_issued(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.issued))
        is_own = one.handle.owner == self.pool.owner
        if is_own:
            released = self.pool.release(one.handle.slot, one.handle.generation)
            assert released == (one.expires_at is not None)
            one.expires_at = None

    @rule(seconds=st.integers(0, TIMEOUT_S))
    def expire(self, seconds: int) -> None:
        self.now += seconds
        due = [one for one in self.live() if (one.expires_at or 0) <= self.now]
        assert set(self.pool.expire(self.now)) == {one.handle for one in due}
        for one in due:
            one.expires_at = None

    @precondition(lambda self: self.issued)
    @rule(data=st.data())
    def read_any_handle_ever_issued(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.issued))
        if one.expires_at is None:
            with pytest.raises(HandleLostError):
                self.reader.read(one.handle)
        else:
            copy = self.reader.read(one.handle)
            assert copy.dtype == one.tensor.dtype
            assert torch.equal(copy, one.tensor)

    @rule(seq=st.integers(0, 2**62))
    def run_a_slot(self, seq: int) -> None:
        self.pool.set_running_seq(seq)
        assert self.reader.running_seq(self.pool.name) == seq

    @rule()
    def restart(self) -> None:
        self.pool.close()
        for one in self.issued:
            one.expires_at = None
        self.begin()

    @rule()
    def sweep(self) -> None:
        assert sweep(self.directory) == ()

    @invariant()
    def every_slot_is_somewhere(self) -> None:
        if self.lives:
            taken = len(self.acquired) + len(self.live())
            assert self.pool.num_free == NUM_SLOTS - taken

    def teardown(self) -> None:
        if self.lives:
            self.pool.close()
        assert list(self.directory.iterdir()) == []
        self.folder.cleanup()


class GpuPoolMachine(PoolMachine):
    """The same for a pool on a GPU that stands in for one."""

    def __init__(self) -> None:
        self.gpu = FakeGpu()
        self.ipc = self.gpu
        super().__init__()

    def teardown(self) -> None:
        super().teardown()
        assert "offered" not in self.gpu.exports, "each export is opened or taken back"


QUICK = settings(max_examples=20, stateful_step_count=40, deadline=None)
TestPoolInSharedMemory = PoolMachine.TestCase
TestPoolInSharedMemory.settings = QUICK
TestPoolOnGpu = GpuPoolMachine.TestCase
TestPoolOnGpu.settings = QUICK
