"""The life of a pool's file under /dev/shm: made and locked, opened, swept when its owner is dead.

A file belongs to the process that holds its `flock`. When that process ends, however it ends, the
kernel lets go of the lock, and `sweep` may unlink the file. Nobody but the owner and the sweeper
unlinks; what a reader has mapped stays valid until it lets go. (The standard library's
`shared_memory` deletes segments that other processes still use, below Python 3.13.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import ConfigurationError, HandleLostError
from shared.host import SHM_DIRECTORY
from shared.tensors.layout import PAGE_BYTES, PoolFile, PoolLayout, read_companion, read_layout

PREFIX: Final = "synerdiff-"

_NAME: Final = re.compile(re.escape(PREFIX) + r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_COMPANION: Final = re.compile(r"torch_[0-9]+_[0-9]+_[0-9]+")  # PyTorch's name for its counters
_MAP_FLAGS: Final = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
_OPEN_FLAGS: Final = os.O_NOFOLLOW | os.O_CLOEXEC


def pool_name(owner: str) -> str:
    """Return the name of an incarnation's pool.

    Raises:
        ConfigurationError: The incarnation would make no file name.
    """
    name = PREFIX + owner
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"incarnation {owner!r} names a file: 1 to 128 ASCII letters, digits, '.', '_' and '-'"
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedPoolFile:
    """A pool's file with the descriptor whose lock makes it ours. Close it exactly once."""

    file: PoolFile
    descriptor: int

    def close(self) -> None:
        """Unlink the file, then let go of it. Readers keep what they have mapped."""
        with contextlib.suppress(FileNotFoundError):
            self.file.path.unlink()
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # the mapping holds a duplicate of it
        os.close(self.descriptor)


def create_pool_file(
    owner: str,
    layout: PoolLayout,
    *,
    host: str,
    device: str = "cpu",
    directory: Path = SHM_DIRECTORY,
) -> OwnedPoolFile:
    """Return a new pool file, its memory reserved, locked by us, readable by its user only.

    Raises:
        ConfigurationError: It exists, or the directory is missing, full, or closed to us.
    """
    path = directory / pool_name(owner)
    try:
        descriptor = _create_locked(path)
        try:
            file = _fill(descriptor, path, layout)
            file.write_header(host=host, owner=owner, device=device)
        except BaseException:
            path.unlink()
            os.close(descriptor)
            raise
    except OSError as error:
        raise ConfigurationError(f"Can't create the tensor pool {path}: {error}.") from error
    return OwnedPoolFile(file=file, descriptor=descriptor)


def open_pool_file(name: str, *, host: str, directory: Path = SHM_DIRECTORY) -> PoolFile:
    """Return another process's pool, mapped for reading, its file and header checked.

    Raises:
        HandleLostError: No such file, not ours to trust, or of another host, version or size.
    """
    path = pool_path(name, directory)
    try:
        descriptor = os.open(path, os.O_RDWR | _OPEN_FLAGS)
    except OSError as error:
        raise HandleLostError(f"can't open pool {name}: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not _is_ours(status) or status.st_size < PAGE_BYTES:
            raise HandleLostError(f"{name} is none of our pools")
        memory = mmap.mmap(descriptor, status.st_size, prot=mmap.PROT_READ, flags=_MAP_FLAGS)
        header = mmap.mmap(descriptor, PAGE_BYTES, flags=_MAP_FLAGS)
    except (OSError, ValueError) as error:
        raise HandleLostError(f"can't map pool {name}: {error}") from error
    finally:
        os.close(descriptor)
    file = PoolFile(path, status.st_ino, memory, read_layout(memory, name), header=header)
    if file.host != host or PREFIX + file.owner != name:
        raise HandleLostError(f"pool {name} was made on another host or by another owner")
    return file


def pool_path(name: str, directory: Path) -> Path:
    """Return where a pool lies that a message names.

    Raises:
        HandleLostError: That is no pool's name, or an attempt at some other file.
    """
    if not _NAME.fullmatch(name):
        raise HandleLostError(f"{name!r} is no pool's name")
    return directory / name


def is_owner_alive(file: PoolFile) -> bool:
    """Return whether somebody still holds a pool's lock."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY | _OPEN_FLAGS)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def sweep(directory: Path = SHM_DIRECTORY) -> tuple[str, ...]:
    """Unlink this user's pools whose owner is dead, and what they left; return their names.

    A live owner's file, another user's, and anything that is no regular file stay. Safe to run at
    any time, by anybody, by several at once; readers keep what they have mapped.
    """
    swept = []
    for path in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, locked by its owner, not ours to open
            if _NAME.fullmatch(path.name) and _unlink_if_dead(path):
                swept.append(path.name)
    return tuple(swept)


def _is_ours(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _create_locked(path: Path) -> int:
    """Return a new file, locked. A sweeper may take it before it is locked: then once more."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | _OPEN_FLAGS, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)


def _fill(descriptor: int, path: Path, layout: PoolLayout) -> PoolFile:
    _reserve(descriptor, layout.file_bytes, path)
    memory = mmap.mmap(descriptor, layout.file_bytes, flags=_MAP_FLAGS)
    return PoolFile(path, os.fstat(descriptor).st_ino, memory, layout)


def _reserve(descriptor: int, num_bytes: int, path: Path) -> None:
    """Give the file all its memory now; a page missing later would be a SIGBUS."""
    room = os.statvfs(path.parent)
    free = room.f_bavail * room.f_frsize
    try:
        # Asked first: reserving until nothing is left would take the memory of everybody else.
        if num_bytes <= free:
            os.ftruncate(descriptor, num_bytes)
            os.posix_fallocate(descriptor, 0, num_bytes)
            return
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise
    raise ConfigurationError(
        f"The tensor pool needs {_mib(num_bytes)} in {path.parent}, which has {_mib(free)} free of "
        f"{_mib(room.f_blocks * room.f_frsize)}. Docker gives a container 64 MiB unless told "
        "otherwise (shm_size, --shm-size); fewer or smaller slots need less."
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _unlink_if_dead(path: Path) -> bool:
    if not _is_ours(path.lstat()):
        return False
    descriptor = os.open(path, os.O_RDONLY | _OPEN_FLAGS)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(descriptor)
        if path.stat().st_ino != status.st_ino:
            return False
        companion = read_companion(descriptor)
        path.unlink()
    finally:
        os.close(descriptor)
    if _COMPANION.fullmatch(companion):
        _unlink_own(SHM_DIRECTORY / companion)
    return True


def _unlink_own(path: Path) -> None:
    with contextlib.suppress(OSError):
        if _is_ours(path.lstat()):
            path.unlink()
