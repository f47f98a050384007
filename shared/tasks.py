"""Ends asyncio tasks for certain.

One cancellation is not enough below Python 3.12: `asyncio.wait_for`, which the Redis client uses,
forgets one that comes at the moment at which its wait is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator, Iterable
from contextvars import Context
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

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        """Add a member, as `asyncio.TaskGroup` does."""
        task = super().create_task(coro, name=name, context=context)
        self._members.add(task)
        task.add_done_callback(self._on_member_done)
        return task

    async def __aexit__(
        self,
        et: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Wait for the members; insist on their end if the body has failed."""
        if et is not None:
            self._insist()
        await super().__aexit__(et, exc, tb)

    def _on_member_done(self, task: asyncio.Task[Any]) -> None:
        self._members.discard(task)
        if not task.cancelled() and task.exception():
            self._insist()

    def _insist(self) -> None:
        for task in self._members:
            task.cancel()
        if self._members:
            asyncio.get_running_loop().call_later(_INSIST_EVERY_S, self._insist)
