"""The consumer's side of tensor pools: open each once, copy out of it, never trust a message."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path

import torch

from shared.cuda_exports import take_export
from shared.cuda_ipc import GpuIpc
from shared.errors import HandleLostError
from shared.host import SHM_DIRECTORY, host_identity
from shared.messages import TensorHandle
from shared.pool_file import is_owner_alive, open_pool_file
from shared.pool_layout import NUM_CONSUMER_WORDS, PoolFile, fence
from shared.slot_memory import GpuSlots, MappedSlots, SlotMemory
from shared.tensor_bytes import DTYPES, num_bytes


class _OpenPool:
    """A pool that a reader has open. why_not: the reason if its memory can't be opened."""

    def __init__(self, file: PoolFile) -> None:
        self.file = file
        self.kind = "cuda_ipc" if file.layout.exports_bytes else "shm"
        self.memory: SlotMemory | None = None if self.kind == "cuda_ipc" else MappedSlots(file)
        self.why_not = ""

    def is_dead(self) -> bool:
        """Whether nothing can be read any more. Mapped data outlives its owner, GPU memory not."""
        if not self.file.is_linked():
            return True
        return self.kind == "cuda_ipc" and not is_owner_alive(self.file)


class TensorReader:
    """The consumer's side of every pool on its host: each opened once, dropped when dead.

    Its methods may be called from several threads.

    Args:
        ipc: Opens pools of kind `cuda_ipc` on its GPU; None can't.
        host: This host's identity.
        directory: Where the pools lie; only tests want another than /dev/shm.
    """

    def __init__(
        self,
        *,
        ipc: GpuIpc | None = None,
        host: str | None = None,
        directory: Path = SHM_DIRECTORY,
    ) -> None:
        self._ipc = ipc
        self._host = host or host_identity()
        self._directory = directory
        self._lock = threading.Lock()
        self._pools: dict[str, _OpenPool] = {}
        # Few share a device; two that share a word at worst end each other's chunks early.
        self._consumer = secrets.randbelow(NUM_CONSUMER_WORDS)

    def read(self, handle: TensorHandle) -> torch.Tensor:
        """A copy of the tensor that the handle names, the caller's own, on the pool's device.

        The copy runs in the calling thread, on its current stream, and is over on return.

        Raises:
            HandleLostError: It is not, or no longer, there: another host, a closed or replaced
                pool, a slot that has gone to another tensor, or a handle that fits no slot.
        """
        if handle.host != self._host:
            raise HandleLostError(f"pool {handle.pool} is on another host")
        pool = self._open(handle.pool)
        if handle.kind != pool.kind or handle.owner != pool.file.owner:
            raise HandleLostError(f"pool {handle.pool} is no {handle.kind} of {handle.owner}")
        size = num_bytes(handle.shape, handle.dtype)
        layout = pool.file.layout
        if not 0 <= handle.slot < layout.num_slots or size > layout.slot_bytes:
            raise HandleLostError(f"no {size} bytes in slot {handle.slot} of {handle.pool}")
        memory = self._memory(pool)
        _check_generation(pool, handle)
        if pool.file.published_bytes(handle.slot) != size:
            raise HandleLostError(f"slot {handle.slot} of {handle.pool} is not {size} bytes")
        tensor = memory.read(handle.slot, tuple(handle.shape), DTYPES[handle.dtype])
        _check_generation(pool, handle)
        return tensor

    def running_seq(self, pool: str) -> int:
        """The seq of the scheduler slot that a pool's owner is running or last ran, -1 for none.

        Raises:
            HandleLostError: There is no such pool on this host any more.
        """
        return self._open(pool).file.running_seq

    def note_chunks(self, pool: str, *, until_ns: int) -> None:
        """Tell a pool's owner until when chunks run beside its slots, on the monotonic clock.

        Raises:
            HandleLostError: There is no such pool on this host any more.
        """
        self._open(pool).file.note_chunks(self._consumer, until_ns)

    def drop_dead(self) -> int:
        """Let go of the pools that are gone: only then is their memory free. How many there were.

        Opening a new pool does it too; a consumer that opens none calls this now and then.
        """
        with self._lock:
            return self._drop_dead()

    def close(self) -> None:
        """Let go of every pool. Readers never delete anything."""
        with self._lock:
            self._pools.clear()

    def _open(self, name: str) -> _OpenPool:
        pool = self._pools.get(name)
        if pool and pool.file.is_linked():
            return pool
        with self._lock:
            self._drop_dead()
            if name not in self._pools:
                file = open_pool_file(name, host=self._host, directory=self._directory)
                self._pools[name] = _OpenPool(file)
            return self._pools[name]

    def _memory(self, pool: _OpenPool) -> SlotMemory:
        """Where a pool's slots can be read from here."""
        if pool.kind == "shm" and pool.memory:
            return pool.memory
        with self._lock:
            if not is_owner_alive(pool.file):
                raise HandleLostError(f"the owner of {pool.file.path.name} is dead")
            if pool.why_not:
                raise HandleLostError(pool.why_not)
            if pool.memory is None:
                pool.memory = self._open_gpu(pool)
            return pool.memory

    def _open_gpu(self, pool: _OpenPool) -> SlotMemory:
        """Take an export and open it. Once one has failed, no other is wasted on this pool."""
        file, ipc = pool.file, self._ipc
        if ipc is None or ipc.device != file.device:
            pool.why_not = f"{file.path.name} lies on {file.device}, which can't be opened here"
            raise HandleLostError(pool.why_not)
        export = take_export(file)
        try:
            return GpuSlots(ipc.open(export), file.layout, ipc)
        except (HandleLostError, ValueError) as error:
            pool.why_not = str(error)
            raise HandleLostError(pool.why_not) from error

    def _drop_dead(self) -> int:
        dead = [name for name, pool in self._pools.items() if pool.is_dead()]
        for name in dead:
            del self._pools[name]
        return len(dead)


def _check_generation(pool: _OpenPool, handle: TensorHandle) -> None:
    """Fenced on both sides, so that the copy stays between two of these."""
    fence()
    found = pool.file.generation(handle.slot)
    fence()
    if found != handle.generation or found == 0:
        raise HandleLostError(
            f"slot {handle.slot} of {handle.pool} is at generation {found}, not {handle.generation}"
        )
