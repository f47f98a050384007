"""The files behind metrics that several processes share (PROMETHEUS_MULTIPROC_DIR).

The library maps a file for each kind of metric and makes it as long as it may need, without the
room: where none is left when a page is first written, the kernel ends the process by SIGBUS. So a
process makes its files beforehand, with their room. Checked against prometheus-client 0.26, whose
naming of the files and treatment of one that exists are followed here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path
from typing import Final

_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
_FILE_BYTES: Final = {
    "counter": 128 << 10,
    "histogram": 512 << 10,
    "gauge_mostrecent": 128 << 10,
    "gauge_livesum": 64 << 10,
}
"""By what a file's name begins with: several times what our metrics with all their labels take."""


def reserve_files() -> None:
    """Make this process's files; where they don't fit, it keeps its metrics to itself.

    For before the first metric is made.
    """
    folder = os.environ.get(_VARIABLE)
    if not folder:
        return
    paths = {Path(folder) / f"{kind}_{os.getpid()}.db": size for kind, size in _FILE_BYTES.items()}
    try:
        for path, size in paths.items():
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()
        del os.environ[_VARIABLE]


def clear_after(pid: int, folder: Path) -> None:
    """Forget what a dead process was at; keep what it has counted, without the room beyond."""
    # Not at the top: the library decides at its import whether metrics are shared.
    from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415

    with contextlib.suppress(OSError):
        mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
        for path in folder.glob(f"*_{pid}.db"):
            with path.open("rb+") as file:
                (num_used,) = struct.unpack("i", file.read(4))
                file.truncate(-(-num_used // mmap.PAGESIZE) * mmap.PAGESIZE)
