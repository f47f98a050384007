"""The file under /dev/shm behind every tensor pool: header, words, slots, ownership.

Layout (words are 8 bytes in the machine's order, each store and load of one is a single access):

    page 0    word 0 magic, written last, 1 version, 2 number of slots, 3 bytes per slot,
              4 running seq (signed), 5 bytes of the table of exports; text: host, owner
    words     per slot one cache line: word 0 generation, word 1 bytes published
    exports   what the kind `cuda_ipc` leaves for its consumers; empty for `shm`
    data      the slots, page by page; empty for `cuda_ipc`, whose data lies on the GPU

A generation word is 0 while its slot has nothing to read, and otherwise names the one publication
whose data is there in full. Generations ascend within a file and files are never reused, so a
reader that finds the same generation before and after its copy has copied that very publication.

A file belongs to the process that holds its `flock`. When that process dies, however it dies, the
kernel lets go of the lock, and `sweep` may unlink the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigurationError, HandleLostError
from shared.host import SHM_DIRECTORY

PREFIX: Final = "synerdiff-"
NO_SEQ: Final = -1

_MAGIC: Final = int.from_bytes(b"SynrPool", "little")
_VERSION: Final = 1
_PAGE: Final = 4096
_LINE: Final = 64
_WORD: Final = 8
_HOST_AT, _OWNER_AT, _TEXT_BYTES = 1024, 2048, 256
_MAGIC_WORD, _VERSION_WORD, _SLOTS_WORD, _BYTES_WORD, _SEQ_WORD, _EXPORTS_WORD = range(6)
_NAME: Final = re.compile(re.escape(PREFIX) + r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Bytes = npt.NDArray[np.uint8]

_fence_lock = threading.Lock()


def fence() -> None:
    """Orders every load and store before it against every one after it, as others see them.

    Python has no memory fence. A release of a lock followed by another acquisition of it is one,
    on every machine; x86 would not need it.
    """
    for _ in range(2):
        _fence_lock.acquire()
        _fence_lock.release()


def pool_name(owner: str) -> str:
    """The name of an incarnation's pool.

    Raises:
        ValueError: The incarnation would make no file name.
    """
    name = PREFIX + owner
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"incarnation {owner!r} makes no pool name: letters, digits, '.', '_', '-'"
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLayout:
    """The sizes of one pool file. num_slots, slot_bytes: at least 1; the data may lie elsewhere."""

    num_slots: int
    slot_bytes: int
    exports_bytes: int = 0
    is_data_inside: bool = True

    @property
    def exports_at(self) -> int:
        """Offset of the table of exports."""
        return _pages(_PAGE + self.num_slots * _LINE)

    @property
    def data_at(self) -> int:
        """Offset of the first slot."""
        return self.exports_at + _pages(self.exports_bytes)

    @property
    def slot_stride(self) -> int:
        """Distance between slots: whole pages."""
        return _pages(self.slot_bytes)

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return self.data_at + (self.num_slots * self.slot_stride if self.is_data_inside else 0)


class PoolFile:
    """One mapped pool file. Made by `create_pool_file` (owner) or `open_pool_file` (reader).

    The mapping lives as long as this object or anything made from it; nothing is unmapped under
    a reader. Words are read and written atomically; their order is the caller's, by `fence`.
    """

    def __init__(self, path: Path, layout: PoolLayout, memory: mmap.mmap, *, inode: int) -> None:
        self.path = path
        self.layout = layout
        self._inode = inode
        self._memory = memory
        self._words = memoryview(memory)[: layout.exports_at].cast("q")
        self._bytes: Bytes = np.frombuffer(memory, np.uint8)

    @property
    def host(self) -> str:
        """The host identity that the owner wrote."""
        return self._text(_HOST_AT)

    @property
    def owner(self) -> str:
        """The owner's incarnation."""
        return self._text(_OWNER_AT)

    @property
    def running_seq(self) -> int:
        """The seq of the slot that the owner is running or last ran, -1 before the first."""
        return self._words[_SEQ_WORD]

    @running_seq.setter
    def running_seq(self, seq: int) -> None:
        self._words[_SEQ_WORD] = seq

    def generation(self, slot: int) -> int:
        """What may be read in a slot: a publication's number, 0 for nothing."""
        return self._words[self._line(slot)]

    def set_generation(self, slot: int, generation: int) -> None:
        """Say what may be read in a slot."""
        self._words[self._line(slot)] = generation

    def published_bytes(self, slot: int) -> int:
        """Bytes of the current publication."""
        return self._words[self._line(slot) + 1]

    def set_published_bytes(self, slot: int, num_bytes: int) -> None:
        """Say how many bytes the next publication has."""
        self._words[self._line(slot) + 1] = num_bytes

    def slot_bytes(self, slot: int) -> Bytes:
        """The bytes of a slot, shared. Only where the data lies in the file."""
        start = self.layout.data_at + slot * self.layout.slot_stride
        return self._bytes[start : start + self.layout.slot_bytes]

    def exports(self) -> Bytes:
        """The bytes of the table of exports, shared."""
        return self._bytes[self.layout.exports_at :][: self.layout.exports_bytes]

    def is_linked(self) -> bool:
        """Whether the file is still there under its name; if not, its owner has closed or died."""
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False

    def write_header(self, *, host: str, owner: str) -> None:
        """Fill in the header, the magic last: before it, no reader takes the file for a pool."""
        for offset, text in ((_HOST_AT, host), (_OWNER_AT, owner)):
            encoded = text.encode()
            if len(encoded) > _TEXT_BYTES:
                raise ValueError(f"{text!r} is too long for a pool's header")
            self._bytes[offset : offset + len(encoded)] = np.frombuffer(encoded, np.uint8)
        self._words[_VERSION_WORD] = _VERSION
        self._words[_SLOTS_WORD] = self.layout.num_slots
        self._words[_BYTES_WORD] = self.layout.slot_bytes
        self._words[_EXPORTS_WORD] = self.layout.exports_bytes
        self._words[_SEQ_WORD] = NO_SEQ
        fence()
        self._words[_MAGIC_WORD] = _MAGIC

    def _line(self, slot: int) -> int:
        return (_PAGE + slot * _LINE) // _WORD

    def _text(self, offset: int) -> str:
        raw = self._bytes[offset : offset + _TEXT_BYTES].tobytes()
        return raw.rstrip(b"\0").decode(errors="replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedPoolFile:
    """A pool file with the lock that makes it ours. Close it exactly once."""

    file: PoolFile
    descriptor: int

    def close(self) -> None:
        """Unlink the file, then let go of it. Readers keep what they have mapped."""
        with contextlib.suppress(FileNotFoundError):
            self.file.path.unlink()
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # the mapping holds a duplicate
        os.close(self.descriptor)


def create_pool_file(
    owner: str, layout: PoolLayout, *, host: str, directory: Path = SHM_DIRECTORY
) -> OwnedPoolFile:
    """A new pool file, all its memory reserved, locked by this process.

    Raises:
        ConfigurationError: It exists, or the directory is missing, full, or another's.
    """
    path = directory / pool_name(owner)
    try:
        descriptor = _create_locked(path)
    except OSError as error:
        raise ConfigurationError(f"Can't create the tensor pool {path}: {error}.") from error
    try:
        _reserve(descriptor, layout.total_bytes, path)
        memory = mmap.mmap(descriptor, layout.total_bytes, flags=mmap.MAP_SHARED | _POPULATE)
        file = PoolFile(path, layout, memory, inode=os.fstat(descriptor).st_ino)
        file.write_header(host=host, owner=owner)
    except BaseException:
        path.unlink()
        os.close(descriptor)
        raise
    return OwnedPoolFile(file=file, descriptor=descriptor)


def open_pool_file(name: str, *, host: str, directory: Path = SHM_DIRECTORY) -> PoolFile:
    """Another process's pool file, mapped for reading, after every check of its header.

    Raises:
        HandleLostError: No such file, not ours to trust, or of another host, version or size.
    """
    if not _NAME.fullmatch(name):
        raise HandleLostError(f"{name!r} is no pool's name")
    path = directory / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise HandleLostError(f"can't open pool {name}: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not _is_ours(status) or status.st_size < _PAGE:
            raise HandleLostError(f"{name} is not one of our pools")
        memory = mmap.mmap(descriptor, status.st_size, prot=mmap.PROT_READ, flags=_READ_FLAGS)
    except (OSError, ValueError) as error:
        raise HandleLostError(f"can't map pool {name}: {error}") from error
    finally:
        os.close(descriptor)
    file = PoolFile(path, _checked_layout(memory, name), memory, inode=status.st_ino)
    if file.host != host or pool_name(file.owner) != name:
        raise HandleLostError(f"pool {name} was made on another host or by another owner")
    return file


def sweep(directory: Path = SHM_DIRECTORY) -> tuple[str, ...]:
    """Unlink the pool files of this user whose owner is dead; their names.

    A live owner's file, another user's, and anything that is no regular file stay. Safe to run at
    any time, by anybody, several at once; readers keep what they have mapped.
    """
    swept = []
    for path in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to open
            if _NAME.fullmatch(path.name) and _unlink_if_dead(path):
                swept.append(path.name)
    return tuple(swept)


_POPULATE: Final = getattr(mmap, "MAP_POPULATE", 0)
_READ_FLAGS: Final = mmap.MAP_SHARED | _POPULATE


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE


def _is_ours(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _create_locked(path: Path) -> int:
    """A new file with its lock held. A sweeper may take it in between: then once more."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


def _reserve(descriptor: int, num_bytes: int, path: Path) -> None:
    os.ftruncate(descriptor, num_bytes)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise
        room = os.statvfs(path.parent)
        raise ConfigurationError(
            f"The tensor pool needs {_mib(num_bytes)} in {path.parent}, which has "
            f"{_mib(room.f_bavail * room.f_frsize)} free of {_mib(room.f_blocks * room.f_frsize)}. "
            "Docker gives a container 64 MiB unless told otherwise (shm_size, --shm-size); "
            "fewer or smaller slots need less."
        ) from error


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _checked_layout(memory: mmap.mmap, name: str) -> PoolLayout:
    words = memoryview(memory)[:_PAGE].cast("q")
    if words[_MAGIC_WORD] != _MAGIC or words[_VERSION_WORD] != _VERSION:
        raise HandleLostError(f"{name} is no tensor pool of this version")
    fence()
    layout = PoolLayout(
        num_slots=words[_SLOTS_WORD],
        slot_bytes=words[_BYTES_WORD],
        exports_bytes=words[_EXPORTS_WORD],
        is_data_inside=words[_EXPORTS_WORD] == 0,
    )
    sizes = (layout.num_slots, layout.slot_bytes, layout.exports_bytes + 1)
    if min(sizes) < 1 or layout.total_bytes != len(memory):
        raise HandleLostError(f"the header of {name} doesn't fit its size")
    return layout


def _unlink_if_dead(path: Path) -> bool:
    if not _is_ours(path.lstat()):
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino != os.fstat(descriptor).st_ino:
            return False
        path.unlink()
    finally:
        os.close(descriptor)
    return True
