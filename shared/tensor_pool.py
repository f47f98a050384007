"""Tensors between processes: a producer's fixed slots, and the consumer that copies out of them.

Producer: `acquire` a slot, `publish` a tensor in it (copies in, then says so), hear of its
`release`, or let it `expire`. Consumer: `read` a handle: generation, copy, generation again; a
difference is a `HandleLostError` and never a torn tensor. See `pool_file` for what lies where.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch

from shared.errors import HandleLostError
from shared.host import SHM_DIRECTORY, host_identity
from shared.messages import TensorHandle
from shared.pool_file import (
    PoolFile,
    PoolLayout,
    create_pool_file,
    fence,
    open_pool_file,
    pool_name,
)
from shared.tensor_bytes import DTYPES, as_bytes, dtype_name, num_bytes

DEFAULT_TIMEOUT_S: Final = 60.0


class SlotMemory(Protocol):
    """Where the slots' data lies. Both calls are over, on every device, when they return."""

    kind: str

    def write(self, slot: int, tensor: torch.Tensor) -> None:
        """Copy a tensor, on any device, into a slot."""

    def read(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A copy of a slot's beginning as a tensor of this shape."""


class MappedMemory:
    """Slots inside the pool's file: the kind `shm`. One thread copies, without the GIL."""

    kind = "shm"

    def __init__(self, file: PoolFile) -> None:
        self._file = file

    def write(self, slot: int, tensor: torch.Tensor) -> None:
        """Copy a tensor, on any device, into a slot."""
        source = as_bytes(tensor.cpu().contiguous())
        np.copyto(self._file.slot_bytes(slot)[: source.size], source)

    def read(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A copy of a slot's beginning as a CPU tensor of this shape."""
        tensor = torch.empty(shape, dtype=dtype)
        target = as_bytes(tensor)
        np.copyto(target, self._file.slot_bytes(slot)[: target.size])
        return tensor


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
        host: This host's identity.
        directory: Where the file goes; only tests want another than /dev/shm.

    Raises:
        ConfigurationError: No room in /dev/shm, no /dev/shm, or a pool of that owner exists.
    """

    def __init__(
        self,
        owner: str,
        *,
        num_slots: int,
        slot_bytes: int,
        timeout_s: float = DEFAULT_TIMEOUT_S,
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
        self._timeout_s = timeout_s
        layout = PoolLayout(num_slots=num_slots, slot_bytes=slot_bytes)
        self._owned = create_pool_file(owner, layout, host=self.host, directory=directory)
        self._file = self._owned.file
        self._memory: SlotMemory = MappedMemory(self._file)
        self._lock = threading.Lock()
        self._free = list(range(num_slots))
        self._acquired: set[int] = set()
        self._published: dict[int, _Publication] = {}
        self._last_generation = 0
        self._is_closed = False

    @property
    def num_free(self) -> int:
        """Slots that `acquire` could hand out now."""
        return len(self._free)

    def acquire(self) -> int | None:
        """A slot for `publish` or `abandon`; None when all are taken: wait, and finish nothing."""
        with self._lock:
            if not self._free:
                return None
            slot = self._free.pop()
            self._acquired.add(slot)
            return slot

    def abandon(self, slot: int) -> None:
        """Give an acquired slot back unpublished."""
        with self._lock:
            self._acquired.remove(slot)
            self._free.append(slot)

    def publish(
        self, slot: int, tensor: torch.Tensor, *, now: float, inline_key: str = ""
    ) -> TensorHandle:
        """Copy a tensor into an acquired slot and make it readable until release or time-out.

        now: seconds, on the clock that `expire` gets. The slot is no longer the caller's, also
        when this raises: then it is free again.

        Raises:
            ValueError: The slot was not acquired, or the tensor's dtype or size don't fit the pool.
        """
        with self._lock:
            if slot not in self._acquired:
                raise ValueError(f"slot {slot} of {self.name} was not acquired")
            self._last_generation += 1
            generation = self._last_generation
        try:
            handle = self._handle(slot, generation, tensor, inline_key)
            self._memory.write(slot, tensor)
        except BaseException:
            self.abandon(slot)
            raise
        self._file.set_published_bytes(slot, tensor.nbytes)
        fence()
        self._file.set_generation(slot, generation)
        with self._lock:
            self._acquired.remove(slot)
            self._published[slot] = _Publication(handle=handle, expires_at=now + self._timeout_s)
        return handle

    def release(self, slot: int, generation: int) -> bool:
        """Take a slot back. False, and nothing happens, if that publication is over already."""
        with self._lock:
            publication = self._published.get(slot)
            if publication is None or publication.handle.generation != generation:
                return False
            self._withdraw(slot)
            return True

    def expire(self, now: float) -> tuple[TensorHandle, ...]:
        """Take back every slot whose time-out has passed; what was in them, for the log."""
        with self._lock:
            expired = [p.handle for p in self._published.values() if p.expires_at <= now]
            for handle in expired:
                self._withdraw(handle.slot)
            return tuple(expired)

    def set_running_seq(self, seq: int) -> None:
        """Say which scheduler slot runs now; consumers start their chunks beside it."""
        self._file.running_seq = seq

    def close(self) -> None:
        """Unlink the file; every handle is lost. Closing twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            self._owned.close()

    def _handle(
        self, slot: int, generation: int, tensor: torch.Tensor, inline_key: str
    ) -> TensorHandle:
        if not 0 < tensor.nbytes <= self.slot_bytes:
            raise ValueError(f"{tensor.nbytes} bytes don't fit a slot of {self.slot_bytes}")
        return TensorHandle(
            kind=self._memory.kind,
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


class TensorReader:
    """The consumer's side of every pool on its host: each opened once, dropped when dead.

    Its methods may be called from several threads.

    Args:
        host: This host's identity.
        directory: Where the pools lie; only tests want another than /dev/shm.
    """

    def __init__(self, *, host: str | None = None, directory: Path = SHM_DIRECTORY) -> None:
        self._host = host or host_identity()
        self._directory = directory
        self._lock = threading.Lock()
        self._pools: dict[str, PoolFile] = {}

    def read(self, handle: TensorHandle) -> torch.Tensor:
        """A copy of the tensor that the handle names, the caller's own.

        Raises:
            HandleLostError: It is not, or no longer, there: another host, a closed or replaced
                pool, a slot that has gone to another tensor, or a handle that fits no slot.
        """
        if handle.kind != MappedMemory.kind:
            raise HandleLostError(f"kind {handle.kind!r} is not read from a pool")
        if handle.host != self._host:
            raise HandleLostError(f"pool {handle.pool} is on another host")
        file = self._open(handle.pool)
        if file.owner != handle.owner:
            raise HandleLostError(f"pool {handle.pool} is not {handle.owner}'s")
        size = num_bytes(handle.shape, handle.dtype)
        if not 0 <= handle.slot < file.layout.num_slots or size > file.layout.slot_bytes:
            raise HandleLostError(f"slot {handle.slot} of {size} bytes is not in {handle.pool}")
        self._check_generation(file, handle)
        if file.published_bytes(handle.slot) != size:
            raise HandleLostError(f"slot {handle.slot} of {handle.pool} is not {size} bytes")
        tensor = MappedMemory(file).read(handle.slot, handle.shape, DTYPES[handle.dtype])
        fence()
        self._check_generation(file, handle)
        return tensor

    def running_seq(self, pool: str) -> int:
        """The seq of the scheduler slot that a pool's owner is running or last ran, -1 for none.

        Raises:
            HandleLostError: There is no such pool on this host any more.
        """
        return self._open(pool).running_seq

    def drop_dead(self) -> int:
        """Let go of the pools whose files are gone: unmapping frees their memory. How many."""
        with self._lock:
            dead = [name for name, file in self._pools.items() if not file.is_linked()]
            for name in dead:
                del self._pools[name]
            return len(dead)

    def close(self) -> None:
        """Let go of every pool. Readers never delete anything."""
        with self._lock:
            self._pools.clear()

    def _open(self, name: str) -> PoolFile:
        file = self._pools.get(name)
        if file is not None and file.is_linked():
            return file
        self.drop_dead()
        file = open_pool_file(name, host=self._host, directory=self._directory)
        with self._lock:
            return self._pools.setdefault(name, file)

    def _check_generation(self, file: PoolFile, handle: TensorHandle) -> None:
        found = file.generation(handle.slot)
        fence()
        if found != handle.generation or found == 0:
            raise HandleLostError(
                f"slot {handle.slot} of {handle.pool} is at generation {found}, "
                f"not {handle.generation}"
            )
