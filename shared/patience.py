"""A client that waits while the store takes no writes.

Its memory may be full, its disk, or it loads, fails over or is busy: none of this is wrong with the
command, so it is given again until it is taken. A service that answers clients at once instead says
so (`is_patient=False`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError, ResponseError

from shared.logs import get_logger

RETRY_S = 0.25

_PAUSES = ("OOM ", "MISCONF ", "READONLY ", "LOADING ", "BUSY ", "NOREPLICAS ", "MASTERDOWN ")

T = TypeVar("T")

log = get_logger()


def is_pause(error: Exception) -> bool:
    """Whether the store refuses a command for now, whatever the command."""
    if isinstance(error, OutOfMemoryError | ReadOnlyError | BusyLoadingError):
        return True
    return isinstance(error, ResponseError) and str(error).startswith(_PAUSES)


class StorePatience:
    """How long a client waits, and whether it does; its pipelines share it.

    is_patient: False raises what the store says at once.
    """

    def __init__(self, *, is_patient: bool) -> None:
        self._gives_up_at = float("inf") if is_patient else 0.0
        self._num_waiting = 0
        self._resumed_at = float("-inf")

    def end_in(self, seconds: float) -> None:
        """Wait no longer than this from now on: the process wants to end."""
        self._gives_up_at = min(self._gives_up_at, time.monotonic() + seconds)

    def seconds_since_pause(self) -> float:
        """How long the store has been taking commands again; infinite if it always has."""
        return 0.0 if self._num_waiting else time.monotonic() - self._resumed_at

    async def wait_for(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What the attempt returns, made again while the store is paused.

        Raises:
            RedisError: As the attempt does, and what the store said when patience has ended.
        """
        is_waiting = False
        try:
            while True:
                try:
                    return await attempt()
                except (ResponseError, BusyLoadingError) as error:
                    if not is_pause(error) or time.monotonic() >= self._gives_up_at:
                        raise
                    if not is_waiting:
                        is_waiting = True
                        self._num_waiting += 1
                        if self._num_waiting == 1:
                            log.warning("the store is full: waiting", reason=str(error))
                await asyncio.sleep(RETRY_S)
        finally:
            if is_waiting:
                self._num_waiting -= 1
                if not self._num_waiting:
                    self._resumed_at = time.monotonic()
                    log.info("the store has room again")


class PatientRedis(Redis):
    """A client whose commands, scripts and transactions are given again while the store is paused.

    A connection is held for the attempts only, so those that need no room go on meanwhile.
    """

    patience = StorePatience(is_patient=True)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """As the base class."""
        command = cast("Any", super().execute_command)
        return await self.patience.wait_for(lambda: command(*args, **options))

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> PatientPipeline:
        """As the base class."""
        pipeline = PatientPipeline(
            self.connection_pool, self.response_callbacks, transaction, shard_hint
        )
        pipeline.patience = self.patience
        return pipeline


class PatientPipeline(Pipeline):
    """A transaction that is refused has done nothing, so the whole of it is given again."""

    patience = StorePatience(is_patient=True)

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """As the base class."""
        commands, scripts = list(self.command_stack), set(self.scripts)

        async def attempt() -> list[Any]:
            # Each attempt leaves the pipeline empty.
            self.command_stack, self.scripts = list(commands), set(scripts)
            return await super(PatientPipeline, self).execute(raise_on_error)

        return await self.patience.wait_for(attempt)
