"""Become a command that does not outlive its parent.

    child.py PARENT_PID SIGNAL NICENESS COMMAND...

Run as a script by the supervisor, in its main thread, for each service: the kernel then sends
SIGNAL to the service when the supervisor is gone, however it went. The process id stays the same.
NICENESS is by how much it gives way to other processes, 0 to 19.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2); kept across exec


def main() -> None:
    """Arrange the death signal, then become the command."""
    parent_pid, death_signal, niceness, *command = sys.argv[1:]
    os.nice(int(niceness))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != int(parent_pid):
            sys.exit("the supervisor is gone")
    os.execvp(command[0], command)  # noqa: S606 (no shell is the point)


if __name__ == "__main__":
    main()
