"""What lies where in the file behind a tensor pool, and how its words are read and written.

Words are 8 bytes in the machine's order; each load and store of one is a single access.

    page 0    word 0 magic, written last, 1 version, 2 number of slots, 3 bytes per slot,
              4 running seq, 5 bytes of the table of exports, 6 until when chunks run beside the
              owner's slots; texts: host, owner, device, companion
    lines     one cache line per slot: word 0 generation, word 1 bytes published
    exports   what a GPU pool leaves for its consumers (`cuda_exports`); empty in a CPU pool
    data      the slots, page by page; empty in a GPU pool, whose data lies on the GPU

A generation word is 0 while its slot has nothing to read, and otherwise names the one publication
whose data is there in full. Generations ascend within a file and files are never used again, so a
reader that finds the same generation before and after its copy has copied that very publication.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.errors import HandleLostError

Bytes = npt.NDArray[np.uint8]

PAGE_BYTES: Final = 4096
NO_SEQ: Final = -1

_MAGIC: Final = int.from_bytes(b"SynrPool", "little")
_VERSION: Final = 2
_LINE_BYTES: Final = 64
_WORD_BYTES: Final = 8
_MAGIC_WORD, _VERSION_WORD, _SLOTS_WORD, _BYTES_WORD, _SEQ_WORD, _EXPORTS_WORD = range(6)
_FIRST_CHUNKS_WORD: Final = 16
NUM_CONSUMER_WORDS: Final = 64
_TEXT_BYTES: Final = 256
_HOST_AT, _OWNER_AT, _DEVICE_AT, _COMPANION_AT = range(1024, 2048, _TEXT_BYTES)

_fence_lock = threading.Lock()


def fence() -> None:
    """Order every load and store before it against every one after it, as other processes see them.

    Python has no memory fence. The release of a lock followed by its next acquisition is one, on
    every machine; x86 would need none here.
    """
    for _ in range(2):
        _fence_lock.acquire()
        _fence_lock.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLayout:
    """The sizes of one pool. num_slots, slot_bytes: at least 1. exports_bytes: 0 in a CPU pool."""

    num_slots: int
    slot_bytes: int
    exports_bytes: int = 0

    @property
    def exports_at(self) -> int:
        """Offset of the table of exports."""
        return _pages(PAGE_BYTES + self.num_slots * _LINE_BYTES)

    @property
    def data_at(self) -> int:
        """Offset of the first slot."""
        return self.exports_at + _pages(self.exports_bytes)

    @property
    def slot_stride(self) -> int:
        """Bytes from one slot to the next, in the file or on the GPU: whole pages."""
        return _pages(self.slot_bytes)

    @property
    def data_bytes(self) -> int:
        """Size of all slots."""
        return self.num_slots * self.slot_stride

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.data_at + (0 if self.exports_bytes else self.data_bytes)


class PoolFile:
    """One mapped pool. `pool_file.create_pool_file` makes the owner's, `open_pool_file` a reader's.

    The mapping lives as long as this object or anything made from it; nothing is unmapped under
    a reader. Words are read and written atomically; their order is the caller's, by `fence`. A
    reader's mapping can't be written, but for the consumers' words of the header.

    Args:
        path: The file's name, for asking whether it is still there.
        inode: The file's identity, likewise.
        memory: The whole file, mapped.
        layout: The sizes; they fit `memory`.
        header: Page 0 mapped once more, for writing; the owner's memory is that already.
    """

    def __init__(
        self,
        path: Path,
        inode: int,
        memory: mmap.mmap,
        layout: PoolLayout,
        *,
        header: mmap.mmap | None = None,
    ) -> None:
        self.path = path
        self.layout = layout
        self._inode = inode
        self._words = memoryview(memory)[: layout.exports_at].cast("q")
        self._bytes: Bytes = np.frombuffer(memory, np.uint8)
        self._header = memoryview(header or memory)[:PAGE_BYTES].cast("q")

    @property
    def host(self) -> str:
        """The host identity that the owner wrote."""
        return self._text(_HOST_AT)

    @property
    def owner(self) -> str:
        """The owner's incarnation."""
        return self._text(_OWNER_AT)

    @property
    def device(self) -> str:
        """The device identity of the memory that holds the data: "cpu" for the file itself."""
        return self._text(_DEVICE_AT)

    @property
    def companion(self) -> str:
        """A file beside this one that goes when a sweeper takes this one; empty for none."""
        return self._text(_COMPANION_AT)

    @companion.setter
    def companion(self, name: str) -> None:
        self._set_text(_COMPANION_AT, name)

    @property
    def running_seq(self) -> int:
        """The seq of the slot that the owner is running or last ran, -1 before the first."""
        return self._words[_SEQ_WORD]

    @running_seq.setter
    def running_seq(self, seq: int) -> None:
        self._words[_SEQ_WORD] = seq

    @property
    def chunks_until_ns(self) -> int:
        """Until when consumers' chunks run beside the owner's slots, as they said last.

        On the host's monotonic clock, so that those of a consumer that died are over soon.
        """
        return max(self._header[_FIRST_CHUNKS_WORD : _FIRST_CHUNKS_WORD + NUM_CONSUMER_WORDS])

    def note_chunks(self, consumer: int, until_ns: int) -> None:
        """A consumer's chunks run until then; consumer: below `NUM_CONSUMER_WORDS`."""
        self._header[_FIRST_CHUNKS_WORD + consumer] = until_ns

    def generation(self, slot: int) -> int:
        """What may be read in a slot: a publication's number, 0 for nothing."""
        return self._words[_line(slot)]

    def set_generation(self, slot: int, generation: int) -> None:
        """Say what may be read in a slot."""
        self._words[_line(slot)] = generation

    def published_bytes(self, slot: int) -> int:
        """Bytes of the publication whose generation the slot names."""
        return self._words[_line(slot) + 1]

    def set_published_bytes(self, slot: int, num_bytes: int) -> None:
        """Say how many bytes the next publication has."""
        self._words[_line(slot) + 1] = num_bytes

    def slot_data(self, slot: int) -> Bytes:
        """The bytes of a slot, shared. Only in a CPU pool."""
        start = self.layout.data_at + slot * self.layout.slot_stride
        return self._bytes[start : start + self.layout.slot_bytes]

    def is_linked(self) -> bool:
        """Whether the file is still there; if not, its owner closed it or somebody swept it."""
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False

    def write_header(self, *, host: str, owner: str, device: str) -> None:
        """Fill in the header, the magic last: before it, no reader takes the file for a pool."""
        self._set_text(_HOST_AT, host)
        self._set_text(_OWNER_AT, owner)
        self._set_text(_DEVICE_AT, device)
        self._words[_VERSION_WORD] = _VERSION
        self._words[_SLOTS_WORD] = self.layout.num_slots
        self._words[_BYTES_WORD] = self.layout.slot_bytes
        self._words[_EXPORTS_WORD] = self.layout.exports_bytes
        self._words[_SEQ_WORD] = NO_SEQ
        fence()
        self._words[_MAGIC_WORD] = _MAGIC

    def _text(self, offset: int) -> str:
        raw = self._bytes[offset : offset + _TEXT_BYTES].tobytes()
        return raw.partition(b"\0")[0].decode(errors="replace")

    def _set_text(self, offset: int, text: str) -> None:
        encoded = text.encode()
        if len(encoded) > _TEXT_BYTES:
            raise ValueError(f"{text!r} is too long for a pool's header")
        padded = encoded.ljust(_TEXT_BYTES, b"\0")
        self._bytes[offset : offset + _TEXT_BYTES] = np.frombuffer(padded, np.uint8)


def read_layout(memory: mmap.mmap, name: str) -> PoolLayout:
    """The sizes that a mapped file's header claims, checked against its length (at least a page).

    Raises:
        HandleLostError: It is no pool of this version, half made, or its sizes don't fit.
    """
    words = memoryview(memory)[:PAGE_BYTES].cast("q")
    if words[_MAGIC_WORD] != _MAGIC or words[_VERSION_WORD] != _VERSION:
        raise HandleLostError(f"{name} is no tensor pool of this version")
    fence()
    layout = PoolLayout(
        num_slots=words[_SLOTS_WORD],
        slot_bytes=words[_BYTES_WORD],
        exports_bytes=words[_EXPORTS_WORD],
    )
    is_sane = layout.num_slots > 0 and layout.slot_bytes > 0 and layout.exports_bytes >= 0
    if not is_sane or layout.file_bytes != len(memory):
        raise HandleLostError(f"the header of {name} doesn't fit its {len(memory)} bytes")
    return layout


def read_companion(descriptor: int) -> str:
    """`PoolFile.companion` of an open file of any kind; empty unless it is a pool of ours."""
    raw = os.pread(descriptor, PAGE_BYTES, 0)
    if int.from_bytes(raw[:_WORD_BYTES], sys.byteorder) != _MAGIC:
        return ""
    return raw[_COMPANION_AT:][:_TEXT_BYTES].partition(b"\0")[0].decode(errors="replace")


def _line(slot: int) -> int:
    return (PAGE_BYTES + slot * _LINE_BYTES) // _WORD_BYTES


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
