"""Names of workers; apart from `worker` so that a health check need not import torch."""

from __future__ import annotations

import os
import socket
import uuid


def make_worker_id(template: str, kind: str) -> str:
    """A name that the next process in this place gets again.

    template: may hold {kind}, {hostname} and {pid}; a container's hostname is its own.
    """
    return template.format(kind=kind, hostname=socket.gethostname(), pid=os.getpid())


def make_incarnation(worker_id: str) -> str:
    """A name for this process's life that no other has."""
    return f"{worker_id}-{uuid.uuid4().hex[:8]}"
