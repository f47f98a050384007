"""What workers' registrations say; during an upgrade some may be of another version."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shared import codec
from shared.errors import ProtocolError
from shared.messages import WorkerInfo


def readable_workers(
    payloads: Iterable[object], *, on_unreadable: Callable[[ProtocolError], None] | None = None
) -> list[WorkerInfo]:
    """Return the workers whose registrations this version can read.

    Args:
        payloads: The server's answers; what is not bytes has lapsed, or never was a registration.
        on_unreadable: Is told why one is left out.
    """
    workers = []
    for payload in payloads:
        if isinstance(payload, bytes):
            try:
                workers.append(codec.decode_value(payload, WorkerInfo))
            except ProtocolError as error:
                if on_unreadable:
                    on_unreadable(error)
    return workers
