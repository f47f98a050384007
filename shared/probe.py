"""What a process shows to those who watch it: its metrics, and whether work can count on it.

In containers each service serves both on its `metrics_port`; the gateway's own port has them too.
A process is ready for as long as it keeps saying so, which its heartbeat does: one that hangs, or
can't reach Redis, stops being ready by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import TYPE_CHECKING

from shared.errors import ConfigurationError
from shared.metrics import render_metrics

if TYPE_CHECKING:
    from aiohttp import web


class Readiness:
    """Whether a process is ready. Its methods may be called from several threads."""

    def __init__(self) -> None:
        self._until = 0.0

    def renew(self, seconds: float) -> None:
        """Be ready for so long from now on; 0 for not any more."""
        self._until = time.monotonic() + seconds

    @property
    def is_ready(self) -> bool:
        """Return whether it was said lately."""
        return time.monotonic() < self._until


READINESS = Readiness()
"""This process's own."""


@contextlib.asynccontextmanager
async def serving_probe(port: int) -> AsyncIterator[None]:
    """Serve /metrics and /readyz on all interfaces meanwhile; port 0 serves neither.

    Raises:
        ConfigurationError: The port can't be listened on.
    """
    if not port:
        yield
        return
    from aiohttp import web  # noqa: PLC0415 - most workers serve nothing and don't load it

    app = web.Application()
    app.router.add_get("/metrics", _answer_metrics)
    app.router.add_get("/readyz", _answer_readyz)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, "0.0.0.0", port).start()  # noqa: S104 - it is scraped
        except OSError as error:
            raise ConfigurationError(
                f"SYNERDIFF_METRICS_PORT={port}: can't listen there: {error}"
            ) from error
        yield
    finally:
        await runner.cleanup()


async def _answer_metrics(_: web.Request) -> web.Response:
    from aiohttp import web  # noqa: PLC0415

    body, content_type = await asyncio.to_thread(render_metrics)
    return web.Response(body=body, headers={"Content-Type": content_type})


async def _answer_readyz(_: web.Request) -> web.Response:
    from aiohttp import web  # noqa: PLC0415

    status = HTTPStatus.OK if READINESS.is_ready else HTTPStatus.SERVICE_UNAVAILABLE
    return web.Response(status=status, text=status.phrase)
