"""Ends asyncio tasks for certain.

One cancellation is not enough below Python 3.12: `asyncio.wait_for`, which the Redis client uses,
forgets one that comes at the moment at which its wait is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from types import TracebackType
from typing import Any, Final, TypeVar

_INSIST_EVERY_S: Final = 0.1

T = TypeVar("T")


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended; what they raise on their way out is dropped."""
    tasks = set(tasks)
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_INSIST_EVERY_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not complain


class TaskGroup(asyncio.TaskGroup):
    """A task group whose members end when one fails, also those that lose a cancellation."""

    def __init__(self) -> None:
        super().__init__()
        self._members: set[asyncio.Task[Any]] = set()

    def create_task(self, coroutine: Coroutine[Any, Any, T], **options: Any) -> asyncio.Task[T]:
        """Add a member, as `asyncio.TaskGroup` does."""
        task: asyncio.Task[T] = super().create_task(coroutine, **options)
        self._members.add(task)
        task.add_done_callback(self._on_member_done)
        return task

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """Wait for the members; insist on their end if the body has failed."""
        if kind is not None:
            self._insist()
        return await super().__aexit__(kind, error, traceback)

    def _on_member_done(self, task: asyncio.Task[Any]) -> None:
        self._members.discard(task)
        if not task.cancelled() and task.exception():
            self._insist()

    def _insist(self) -> None:
        for task in self._members:
            task.cancel()
        if self._members:
            asyncio.get_running_loop().call_later(_INSIST_EVERY_S, self._insist)
