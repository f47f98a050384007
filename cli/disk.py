"""Whether the file systems that a stack writes to have room."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

MIN_FREE_BYTES: Final = 512 << 10
"""With less than this, what a stack writes at once may not fit, and writes fail by turns."""
_MIB: Final = 1 << 20


def full_disk(folders: Iterable[Path]) -> str:
    """Say which of the folders' file systems is full, in words; empty if none is."""
    for folder in folders:
        try:
            status = os.statvfs(folder)
        except OSError:
            continue  # it isn't there: others have the words for that
        free_bytes = status.f_bavail * status.f_frsize
        if free_bytes < MIN_FREE_BYTES:
            return f"disk full: {free_bytes / _MIB:.1f} MiB free where {folder} is"
        if status.f_files and not status.f_favail:
            return f"disk full: no more files fit where {folder} is"
    return ""
