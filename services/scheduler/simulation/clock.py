"""Simulated time: what is to happen, in order."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Clock:
    """now: in seconds from the start."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0

    def at(self, at_s: float, call: Callable[[], None]) -> None:
        """Call it then; of several at one moment the first that was asked for."""
        self._order += 1
        heapq.heappush(self._heap, (at_s, self._order, call))

    def after(self, ms: float, call: Callable[[], None]) -> None:
        """Call it after so many milliseconds."""
        self.at(self.now + ms / 1000, call)

    def step(self) -> bool:
        """Let the next thing happen; False if there is none."""
        if not self._heap:
            return False
        at_s, _, call = heapq.heappop(self._heap)
        self.now = max(self.now, at_s)
        call()
        return True
