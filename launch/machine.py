"""What the machine has, as far as the standard library and /proc can tell; nothing heavy here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import psutil

_CGROUP: Final = Path("/sys/fs/cgroup")
_MEMORY_LIMIT_FILES: Final = ("memory.max", "memory/memory.limit_in_bytes")


def memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Return the memory this process may use: the machine's, cut to the cgroup's limit."""
    total = int(psutil.virtual_memory().total)
    for name in _MEMORY_LIMIT_FILES:
        try:
            limit = (cgroup / name).read_text().strip()
        except OSError:
            continue
        return total if limit == "max" else min(total, int(limit))
    return total


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the CPU's features as the kernel names them; empty where it does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def shm_bytes(folder: Path = Path("/dev/shm")) -> tuple[int, int] | None:  # noqa: S108 (only asked)
    """Return size and free bytes of the shared-memory file system, None if there is none."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def has_fast_bfloat16(flags: frozenset[str]) -> bool:
    """Return whether a CPU multiplies bfloat16 itself; on others it is slower than float32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
