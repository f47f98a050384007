"""One process at a time loads and measures on a device; what is measured beside that is wrong."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shared.host import SHM_DIRECTORY
from shared.logs import get_logger

MAX_WAIT_S: Final = 120.0
"""Then a worker starts beside the others: a start that hangs must not stop all."""

_PREFIX: Final = "synerdiff_start_"  # not that of pools, which are swept
_LOOK_AGAIN_S: Final = 0.05

log = get_logger()


@contextlib.contextmanager
def alone_on(
    device: str, *, max_wait_s: float = MAX_WAIT_S, directory: Path = SHM_DIRECTORY
) -> Iterator[bool]:
    """Meanwhile no other process of this user on this host is in here for the same device.

    The kernel ends it with the process. Yields False where the wait was too long, or there is no
    place for a lock.
    """
    name = hashlib.sha256(device.encode()).hexdigest()[:16]
    path = directory / f"{_PREFIX}{os.geteuid()}_{name}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        log.warning("starts beside others", reason=str(error))
        yield False
        return
    try:
        is_alone = _lock(descriptor, time.monotonic() + max_wait_s)
        if not is_alone:
            log.warning("starts beside others", reason=f"they take more than {max_wait_s:.0f} s")
        yield is_alone
    finally:
        os.close(descriptor)


def _lock(descriptor: int, until: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_LOOK_AGAIN_S)
        else:
            return True
