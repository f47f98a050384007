"""What a process shows to those who watch it: its metrics, and whether work can count on it.

In containers each service serves both on its `metrics_port`; the gateway's own port has them too.
A process is ready for as long as it keeps saying so, which its heartbeat does: one that hangs, or
can't reach Redis, stops being ready by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from shared.metrics import render_metrics


class Readiness:
    """Whether a process is ready. Its methods may be called from several threads."""

    def __init__(self) -> None:
        self._until = 0.0

    def renew(self, seconds: float) -> None:
        """Be ready for so long from now on; 0 for not any more."""
        self._until = time.monotonic() + seconds

    @property
    def is_ready(self) -> bool:
        """Whether it was said lately."""
        return time.monotonic() < self._until


READINESS = Readiness()
"""This process's own."""


def serve_probe(port: int) -> None:
    """Serve /metrics and /readyz on all interfaces in the background; port 0 does nothing."""
    if port:
        server = make_server("0.0.0.0", port, _answer, _Server, _Handler)  # noqa: S104 (scraped)
        threading.Thread(target=server.serve_forever, name="probe", daemon=True).start()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the library's name)
        """Say nothing: a line per scrape would drown the log."""


def _answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/metrics":
        body, content_type = render_metrics()
        status = HTTPStatus.OK
    elif environ["PATH_INFO"] == "/readyz":
        status = HTTPStatus.OK if READINESS.is_ready else HTTPStatus.SERVICE_UNAVAILABLE
        body, content_type = status.phrase.encode(), "text/plain"
    else:
        status = HTTPStatus.NOT_FOUND
        body, content_type = status.phrase.encode(), "text/plain"
    start_response(f"{status.value} {status.phrase}", [("Content-Type", content_type)])
    return [body]
