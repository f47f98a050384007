"""The table in a GPU pool's file where exports wait for their consumers, each for exactly one.

The owner keeps every cell filled; a consumer takes one, once in its life, and opens it. Nothing is
asked and nobody waits: a consumer that dies between the two costs a counter, not the pool. The
table is read and written through the file, not a mapping, so that readers map the pool read-only.
Two consumers are kept apart by a record lock, which is another kind than the owner's `flock`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from typing import Final

from shared.codec import decode_value, encode_value
from shared.errors import HandleLostError, ProtocolError
from shared.tensors.cuda_ipc import CudaExport, GpuIpc
from shared.tensors.layout import PoolFile

NUM_CELLS: Final = 8
CELL_BYTES: Final = 1024
TABLE_BYTES: Final = NUM_CELLS * CELL_BYTES

_HEAD: Final = struct.Struct("=II")
_EMPTY, _OFFERED, _TAKEN = 0, 1, 2


class ExportTable:
    """The table of one pool's file.

    Args:
        descriptor: The file, open for reading and writing; the caller's.
        offset: Where the table starts.
    """

    def __init__(self, descriptor: int, offset: int) -> None:
        self._descriptor = descriptor
        self._offset = offset

    def refill(self, make: Callable[[], CudaExport]) -> CudaExport | None:
        """Owner: fill every cell that is empty or taken; return the last export made, if any."""
        export = None
        for cell in range(NUM_CELLS):
            if self._head(cell)[0] != _OFFERED:
                export = make()
                self._offer(cell, export)
        return export

    def take(self) -> CudaExport:
        """Consumer: return an export to open now, which nobody else will get.

        Raises:
            HandleLostError: All are taken; the owner makes more at its next tick.
        """
        export = self._take()
        if export is None:
            raise HandleLostError("no export of the pool is left for now")
        return export

    def take_back(self) -> list[CudaExport]:
        """Owner: return the exports that nobody has taken; nobody can take them any more."""
        return list(iter(self._take, None))

    def _take(self) -> CudaExport | None:
        with self._exclusive():
            for cell in range(NUM_CELLS):
                state, length = self._head(cell)
                if state == _OFFERED:
                    payload = os.pread(self._descriptor, length, self._at(cell) + _HEAD.size)
                    os.pwrite(self._descriptor, _HEAD.pack(_TAKEN, 0), self._at(cell))
                    try:
                        return decode_value(payload, CudaExport)
                    except ProtocolError as error:
                        raise HandleLostError(f"unreadable export of a pool: {error}") from error
        return None

    def _offer(self, cell: int, export: CudaExport) -> None:
        payload = encode_value(export)
        if len(payload) > CELL_BYTES - _HEAD.size:
            raise ValueError(f"an export of {len(payload)} bytes doesn't fit its cell")
        os.pwrite(self._descriptor, payload, self._at(cell) + _HEAD.size)
        os.pwrite(self._descriptor, _HEAD.pack(_OFFERED, len(payload)), self._at(cell))

    def _head(self, cell: int) -> tuple[int, int]:
        state, length = _HEAD.unpack(os.pread(self._descriptor, _HEAD.size, self._at(cell)))
        return state, length

    def _at(self, cell: int) -> int:
        return self._offset + cell * CELL_BYTES

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other processes from the table, for some microseconds of file access."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, TABLE_BYTES, self._offset)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, TABLE_BYTES, self._offset)


class PoolExports:
    """The owner's side of a GPU pool: its memory, and the exports that wait for consumers.

    Args:
        ipc: Allocates and exports.
        file: The pool's.
        descriptor: The file, open for reading and writing; the caller's.
    """

    def __init__(self, ipc: GpuIpc, file: PoolFile, descriptor: int) -> None:
        self._ipc = ipc
        self._file = file
        self._table = ExportTable(descriptor, file.layout.exports_at)
        self.memory = ipc.allocate(file.layout.data_bytes)
        self.refill()

    def refill(self) -> None:
        """Replace the exports that were taken."""
        export = self._table.refill(lambda: self._ipc.export(self.memory))
        if export:
            self._file.companion = export.counter_handle.decode().strip("/\0")

    def take_back(self) -> None:
        """Count down what nobody has taken, so that the memory can go."""
        for export in self._table.take_back():
            self._ipc.discard(export)


def take_export(file: PoolFile) -> CudaExport:
    """Return to a consumer an export of a GPU pool to open now, which nobody else will get.

    Raises:
        HandleLostError: The file is gone, or all its exports are taken for now.
    """
    try:
        descriptor = os.open(file.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise HandleLostError(f"can't open {file.path.name}: {error.strerror}") from error
    try:
        return ExportTable(descriptor, file.layout.exports_at).take()
    finally:
        os.close(descriptor)
