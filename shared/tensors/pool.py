"""Tensors between processes: a producer's fixed slots, for consumers to copy out of.

Producer (here): `acquire` a slot, `publish` a tensor in it (copies in, then says so), hear of its
`release`, or let it `expire`. Consumer (`reader`): generation, copy, generation again; a
difference is a `HandleLostError` and never a torn tensor. `layout` says what lies where,
`pool_file` who owns it, `slot_memory` how it is copied, `wire` how tensors go inline.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from shared.host import SHM_DIRECTORY, host_identity
from shared.messages import TensorHandle
from shared.tensors.cuda_exports import TABLE_BYTES, PoolExports
from shared.tensors.cuda_ipc import GpuIpc
from shared.tensors.layout import PoolLayout, fence
from shared.tensors.pool_file import create_pool_file, pool_name
from shared.tensors.slot_memory import GpuSlots, MappedSlots, SlotMemory
from shared.tensors.wire import dtype_name

DEFAULT_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Publication:
    handle: TensorHandle
    expires_at: float


class TensorPool:
    """The producer's slots, shared once. Its methods may be called from several threads.

    Args:
        owner: The producer's incarnation; the pool is named after it.
        num_slots: Finished tensors that may wait at a time.
        slot_bytes: The largest tensor, in bytes.
        timeout_s: Seconds after its publication at which a slot nobody released comes back.
        ipc: Makes it a pool of kind `cuda_ipc` on that GPU; None makes one of kind `shm`.
        host: This host's identity.
        directory: Where the file goes; only tests want another than /dev/shm.

    Raises:
        ConfigurationError: No room in /dev/shm, no /dev/shm, a pool of that owner exists, or the
            owner makes no file name.
        ValueError: The sizes hold nothing.
    """

    def __init__(
        self,
        owner: str,
        *,
        num_slots: int,
        slot_bytes: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        ipc: GpuIpc | None = None,
        host: str | None = None,
        directory: Path = SHM_DIRECTORY,
    ) -> None:
        if num_slots < 1 or slot_bytes < 1:
            raise ValueError(f"a pool of {num_slots} slots of {slot_bytes} bytes holds nothing")
        self.owner = owner
        self.name = pool_name(owner)
        self.host = host or host_identity()
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.kind = "cuda_ipc" if ipc else "shm"
        self._timeout_s = timeout_s
        layout = PoolLayout(
            num_slots=num_slots, slot_bytes=slot_bytes, exports_bytes=TABLE_BYTES if ipc else 0
        )
        self._owned = create_pool_file(
            owner,
            layout,
            host=self.host,
            device=ipc.device if ipc else "cpu",
            directory=directory,
        )
        self._file = self._owned.file
        self._exports: PoolExports | None = None
        self._memory: SlotMemory = MappedSlots(self._file)
        if ipc:
            try:
                self._exports = PoolExports(ipc, self._file, self._owned.descriptor)
            except BaseException:
                self._owned.close()
                raise
            self._memory = GpuSlots(self._exports.memory, layout, ipc)
        self._lock = threading.Lock()
        self._free = list(range(num_slots))
        self._acquired: set[int] = set()
        self._published: dict[int, _Publication] = {}
        self._last_generation = 0
        self._is_closed = False

    @property
    def num_free(self) -> int:
        """Return how many slots `acquire` could hand out now."""
        return len(self._free)

    def acquire(self) -> int | None:
        """Return a slot for `publish` or `abandon`; None while all are taken, to wait for."""
        with self._lock:
            if not self._free:
                return None
            slot = self._free.pop()
            self._acquired.add(slot)
            return slot

    def abandon(self, slot: int) -> None:
        """Give an acquired slot back unpublished.

        Raises:
            ValueError: The slot was not acquired.
        """
        with self._lock:
            self._check_acquired(slot)
            self._acquired.remove(slot)
            self._free.append(slot)

    def publish(
        self, slot: int, tensor: torch.Tensor, *, now: float, inline_key: str = ""
    ) -> TensorHandle:
        """Make a copy of a tensor readable until release or time-out; return its handle.

        The copy runs in the calling thread, on its current stream, and is over on return. If it
        raises, the slot is free again.

        Args:
            slot: From `acquire`; no longer the caller's.
            tensor: On any device, of a dtype that travels, no larger than a slot.
            now: Seconds, on the clock that `expire` gets.
            inline_key: Where a copy lies besides, for the handle.

        Raises:
            ValueError: The slot was not acquired, or the tensor doesn't fit the pool.
        """
        with self._lock:
            self._check_acquired(slot)
            self._last_generation += 1
            generation = self._last_generation
        try:
            handle = self._handle(slot, generation, tensor, inline_key)
            self._memory.write(slot, tensor)
        except BaseException:
            self.abandon(slot)
            raise
        self._file.set_published_bytes(slot, tensor.nbytes)
        with self._lock:
            self._acquired.remove(slot)
            self._published[slot] = _Publication(handle=handle, expires_at=now + self._timeout_s)
            fence()
            self._file.set_generation(slot, generation)
        return handle

    def release(self, slot: int, generation: int) -> bool:
        """Take a slot back; return False, changing nothing, if that publication is over."""
        with self._lock:
            publication = self._published.get(slot)
            if publication is None or publication.handle.generation != generation:
                return False
            self._withdraw(slot)
            return True

    def expire(self, now: float) -> tuple[TensorHandle, ...]:
        """Take back slots whose time-out has passed; return what was in them. Call it regularly.

        It also renews what a GPU pool keeps ready for its consumers.
        """
        if self._exports:
            self._exports.refill()
        with self._lock:
            expired = [p.handle for p in self._published.values() if p.expires_at <= now]
            for handle in expired:
                self._withdraw(handle.slot)
            return tuple(expired)

    def set_running_seq(self, seq: int) -> None:
        """Say which scheduler slot runs now; consumers start their chunks beside it."""
        self._file.running_seq = seq

    def has_chunks_beside(self, now_ns: int) -> bool:
        """Return whether a consumer decodes right now. now_ns: on the host's monotonic clock."""
        return self._file.chunks_until_ns > now_ns

    def close(self) -> None:
        """Unlink the file; every handle is lost. Closing twice is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._exports:
            self._exports.take_back()
        self._owned.close()

    def _check_acquired(self, slot: int) -> None:
        if slot not in self._acquired:
            raise ValueError(f"slot {slot} of {self.name} is not acquired")

    def _handle(
        self, slot: int, generation: int, tensor: torch.Tensor, inline_key: str
    ) -> TensorHandle:
        if not 0 < tensor.nbytes <= self.slot_bytes:
            raise ValueError(f"{tensor.nbytes} bytes don't fit a slot of {self.slot_bytes}")
        return TensorHandle(
            kind=self.kind,
            pool=self.name,
            owner=self.owner,
            host=self.host,
            slot=slot,
            generation=generation,
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor.dtype),
            inline_key=inline_key,
        )

    def _withdraw(self, slot: int) -> None:
        """End a publication for its readers first, then for us. The lock is held."""
        self._file.set_generation(slot, 0)
        fence()
        del self._published[slot]
        self._free.append(slot)
