"""Stops one thread of another process, as a kernel or a driver that never returns would.

Only a debugger can stop a thread without its process, so this needs root, or a system that lets a
process trace its descendants. Linux on x86-64 and arm64.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Final

from shared.errors import SynerDiffError

# <sys/ptrace.h>
_SEIZE: Final = 0x4206
_INTERRUPT: Final = 0x4207
_WAIT_ALL: Final = 0x40000000

_STOPPED: Final = "stopped"


class NotStoppedError(SynerDiffError):
    """The system does not let this process stop another's thread."""

    code = "not_stopped"


@contextlib.contextmanager
def stopped_thread(pid: int) -> Iterator[int]:
    """Stop a process's thread that has computed most, but for its main one; yield its id.

    The thread goes on when the context is left.

    Raises:
        NotStoppedError: The system does not allow it.
    """
    thread = busiest_thread(pid)
    # Whoever traces a thread has to live as long as it should stand still.
    command = (sys.executable, "-P", "-m", "bench.hung_thread", str(thread))
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True) as tracer:  # noqa: S603 (ours)
        assert tracer.stdin
        assert tracer.stdout
        try:
            answer = tracer.stdout.readline().strip()
            if answer != _STOPPED:
                raise NotStoppedError(f"can't stop thread {thread} of process {pid}: {answer}")
            yield thread
        finally:
            tracer.stdin.close()


def busiest_thread(pid: int) -> int:
    """Return the id of the thread with the most processor time, the main thread left out."""
    threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    return max((thread for thread in threads if thread != pid), key=lambda t: _ticks(pid, t))


def _ticks(pid: int, thread: int) -> int:
    """Return the clock ticks that a thread has run, in its own code and in the kernel."""
    fields = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _hold(thread: int) -> None:
    """Stop a thread until the standard input ends; for a process of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(_SEIZE, thread, None, None) < 0:
        print(os.strerror(ctypes.get_errno()), flush=True)
        return
    libc.ptrace(_INTERRUPT, thread, None, None)
    os.waitpid(thread, _WAIT_ALL)
    print(_STOPPED, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _hold(int(sys.argv[1]))
