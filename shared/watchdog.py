"""Ends a process in which something hangs, so that whoever supervises it starts it again.

A thread that hangs in a library can neither be joined nor killed, and an event loop that goes on
without it looks alive. So what computes is watched: each call has a time within which it must be
over. `Patience` says how long that is for work of some size.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from shared.errors import EXIT_STUCK
from shared.logs import get_logger

_LOOK_EVERY_S: Final = 0.25
_LAST_WORDS_S: Final = 3.0
"""What hangs may hold a lock of the log."""

_SLOWER: Final = 20.0
"""A call may take so many times as long as the slowest of its size so far: cores are shared, memory
is swapped, and a size's first call compiles kernels."""

log = get_logger()


class Watchdog:
    """Watches over calls from a thread of its own, from the first one on.

    Args:
        end: What ends the process; it is told what hangs, and doesn't return.
    """

    def __init__(self, end: Callable[[str], None] | None = None) -> None:
        self._end = end or _end_process
        self._watched: dict[int, tuple[str, float]] = {}
        self._numbers = itertools.count()
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def overdue(self) -> str:
        """What should have been over by now, in words; empty if nothing is."""
        now = time.monotonic()
        late = (what for what, ends_at in list(self._watched.values()) if now >= ends_at)
        return next(late, "")

    @contextlib.contextmanager
    def watching(self, what: str, within_s: float) -> Iterator[None]:
        """Meanwhile a call of this thread, or one awaited, that must be over within so long."""
        if not self._thread.is_alive() and not self._is_closed.is_set():
            with contextlib.suppress(RuntimeError):  # another thread has just started it
                self._thread.start()
        number = next(self._numbers)
        self._watched[number] = (what, time.monotonic() + within_s)
        try:
            yield
        finally:
            del self._watched[number]

    def close(self) -> None:
        """Watch no more."""
        self._is_closed.set()

    def _watch(self) -> None:
        while not self._is_closed.wait(_LOOK_EVERY_S):
            if overdue := self.overdue:
                self._end(overdue)
                return


class Patience:
    """How long work of a kind may take, by its size and by how long it has taken.

    Its time is taken to grow with the rows and, since attention is part of it, up to the square of
    the area.

    Args:
        floor_s: However little is asked for.
        usual_pixels: Area of the size that is measured first.
    """

    def __init__(self, floor_s: float, usual_pixels: int) -> None:
        self._floor_s = floor_s
        self._usual_pixels = usual_pixels
        self._slowest_s = 0.0

    def learn(self, duration_s: float, *, rows: int = 1, pixels: int = 0) -> None:
        """Some work has taken so long; pixels: of each row, 0 for the usual ones."""
        self._slowest_s = max(self._slowest_s, duration_s / self._units(rows, pixels))

    def within_s(self, *, rows: int = 1, pixels: int = 0) -> float:
        """How long work of that size may take before it is taken for stuck."""
        return max(self._floor_s, _SLOWER * self._slowest_s * self._units(rows, pixels))

    def _units(self, rows: int, pixels: int) -> float:
        area = (pixels or self._usual_pixels) / self._usual_pixels
        return rows * area * max(area, 1.0)


@contextlib.contextmanager
def watching_interpreter(within_s: float) -> Iterator[Callable[[], None]]:
    """Meanwhile this process ends unless what is yielded is called again within so long.

    For what hangs while it holds the interpreter's lock, so that no Python thread can find it: this
    clock is kept outside of the interpreter. At most one at a time.
    """

    def renew() -> None:
        faulthandler.dump_traceback_later(within_s, exit=True, file=sys.__stderr__ or 2)

    try:
        yield renew
    finally:
        faulthandler.cancel_dump_traceback_later()


def _end_process(what: str) -> None:
    faulthandler.dump_traceback_later(_LAST_WORDS_S, exit=True, file=sys.__stderr__ or 2)
    log.error("stuck: ends, to be started again", call=what, exit_code=EXIT_STUCK)
    faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__ or 2)
    os._exit(EXIT_STUCK)
