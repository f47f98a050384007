"""Stops one thread of another process, as a kernel or a driver that never returns would.

Only a debugger can stop a thread without its process, so this needs root, or a system that lets a
process trace its descendants. Linux on x86-64 and arm64.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from shared.errors import SynerDiffError

# <sys/ptrace.h>
_SEIZE: Final = 0x4206
_INTERRUPT: Final = 0x4207
_WAIT_ALL: Final = 0x40000000


class NotStoppedError(SynerDiffError):
    """The system does not let this process stop another's thread."""

    code = "not_stopped"


@contextlib.contextmanager
def stopped_thread(pid: int) -> Iterator[int]:
    """Stop the thread of a process that has computed most, but for its main one; yields its id.

    The thread goes on when the context is left.

    Raises:
        NotStoppedError: The system does not allow it.
    """
    thread = busiest_thread(pid)
    # Whoever traces a thread has to live as long as it should stand still.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    tracer = context.Process(target=_hold, args=(thread, theirs), daemon=True)
    tracer.start()
    theirs.close()
    try:
        refusal = ours.recv()
        if refusal:
            raise NotStoppedError(f"can't stop thread {thread} of process {pid}: {refusal}")
        yield thread
    finally:
        ours.close()
        tracer.join(10)
        tracer.kill()


def busiest_thread(pid: int) -> int:
    """Return the id of the thread with the most processor time, the main thread left out."""
    threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    return max((thread for thread in threads if thread != pid), key=lambda t: _ticks(pid, t))


def _ticks(pid: int, thread: int) -> int:
    """Return the clock ticks that a thread has run, in its own code and in the kernel."""
    fields = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _hold(thread: int, pipe: Connection) -> None:
    """Stop a thread until the other end of the pipe is closed; in a process of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(_SEIZE, thread, None, None) < 0:
        pipe.send(os.strerror(ctypes.get_errno()))
        sys.exit(1)
    libc.ptrace(_INTERRUPT, thread, None, None)
    os.waitpid(thread, _WAIT_ALL)
    pipe.send("")
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
