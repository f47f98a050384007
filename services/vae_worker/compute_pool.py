"""Several compute threads that share a worker's CPU threads: a decode each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from shared.watchdog import Watchdog
from shared.worker import ComputeThread

T = TypeVar("T")


class ComputePool:
    """Lends compute threads, as far as there are CPU threads for them.

    Belongs to the event loop; only the calls themselves run elsewhere.

    Args:
        count: Calls at once, at most.
        num_threads: CPU threads that all of them may take together.
        watchdog: Watches over every call.
    """

    def __init__(self, count: int, num_threads: int, watchdog: Watchdog) -> None:
        self.num_threads = num_threads
        self._idle = [ComputeThread(num_threads, watchdog) for _ in range(count)]
        self._lent: dict[ComputeThread, int] = {}

    @property
    def is_idle(self) -> bool:
        """Whether none is lent."""
        return not self._lent

    @property
    def has_room(self) -> bool:
        """Whether one more call can begin now."""
        return bool(self._idle) and self._num_free > 0

    def threads_for(self, wanted: int, num_waiting: int) -> int:
        """Return the CPU threads for the next of the waiting calls; there is room for it.

        Those that can begin share what is free: side by side on a thread each, calls take less than
        one after another on all.

        Args:
            wanted: At most; 0 for as many as there are.
            num_waiting: Calls that could begin, this one included.
        """
        num_beginning = min(num_waiting, len(self._idle))
        return min(wanted or self.num_threads, max(self._num_free // num_beginning, 1))

    def lend(self, threads: int, *, is_alone: bool = False) -> ComputeThread:
        """Return an idle compute thread, which counts as so many CPU threads until it is back.

        With `is_alone`, for what must not be disturbed, it counts as all of them. It is one that
        ran on as many before, if there is any: where the number changes, OpenMP starts new threads,
        and in a process that has more of them than cores they sleep at every barrier, so that a
        decode takes twice as long.
        """
        thread = min(self._idle, key=lambda idle: idle.threads != threads)
        self._idle.remove(thread)
        self._lent[thread] = self.num_threads if is_alone else threads
        return thread

    def take_back(self, thread: ComputeThread) -> None:
        """Let another call have a thread that was lent."""
        del self._lent[thread]
        self._idle.append(thread)

    async def run_alone(
        self, what: str, call: Callable[[], T], *, within_s: float, threads: int = 0
    ) -> T:
        """Return a call's result, on so many CPU threads (0: all), while nothing else runs."""
        thread = self.lend(threads or self.num_threads, is_alone=True)
        try:
            return await thread.run(what, call, within_s=within_s, threads=threads)
        finally:
            self.take_back(thread)

    def close(self) -> None:
        """Let the current calls end; wait for them."""
        for thread in (*self._idle, *self._lent):
            thread.close()

    @property
    def _num_free(self) -> int:
        return self.num_threads - sum(self._lent.values())
