"""The store's clock, as the scheduler passes it to its core."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

from redis.asyncio import Redis

from shared.errors import EpochEndedError

MAX_LATENCY_S = 0.25
"""A look that takes longer says too little."""

MAX_STEP_S = 2.0
"""A difference beyond this is a clock that was set: instants before and after don't compare."""


class StoreClock:
    """Seconds since the Unix epoch on the store's clock, never backwards.

    Between two looks at the store it runs on this process's monotonic clock, so that setting the
    wall clock here changes nothing.

    Args:
        redis: The connection; the caller owns it.
        monotonic: This process's clock.
    """

    def __init__(self, redis: Redis, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._monotonic = monotonic
        self._offset: float | None = None
        self._latest = 0.0

    def now(self) -> float:
        """The instant; `look` must have been called."""
        self._latest = max(self._latest, self._monotonic() + (self._offset or 0.0))
        return self._latest

    async def look(self) -> None:
        """Compare with the store.

        Raises:
            EpochEndedError: The store's clock was set.
        """
        before = self._monotonic()
        seconds, microseconds = await cast("Any", self._redis.time())
        after = self._monotonic()
        offset = seconds + microseconds / 1e6 - (before + after) / 2
        if self._offset is not None:
            if after - before > MAX_LATENCY_S:
                return
            if abs(offset - self._offset) > MAX_STEP_S:
                raise EpochEndedError("the store's clock was set; a new epoch begins with it")
        self._offset = offset

    def submitted_at(self, entry_id: str) -> float:
        """When an entry of the request stream was added, which its id says; not after now."""
        return min(int(entry_id.partition("-")[0]) / 1000, self.now())
