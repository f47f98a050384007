"""Whom a failure is about, so that one request or worker can't stop all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.scheduler.core.state import Request, UnetWorker


class BlamedError(Exception):
    """What was done for one request or UNet worker has raised; the cause says what."""

    def __init__(self, subject: Request | UnetWorker, cause: Exception) -> None:
        super().__init__(repr(cause))
        self.subject = subject
        self.cause = cause


@contextmanager
def blamed_on(subject: Request | UnetWorker) -> Iterator[None]:
    """Raise whatever is raised within as a `BlamedError` about this subject."""
    try:
        yield
    except Exception as error:
        raise BlamedError(subject, error) from error
