"""The gateway as a service: its background tasks, its port, its end."""

from __future__ import annotations

import asyncio

from aiohttp import web
from redis.asyncio import Redis

from services.gateway.app import make_app
from services.gateway.context import Gateway
from services.gateway.events import EventBoard
from services.gateway.fleet import FleetWatch
from services.gateway.generation import Generation
from shared.errors import ConfigurationError
from shared.logs import get_logger
from shared.records import Records
from shared.settings import GatewaySettings
from shared.tasks import TaskGroup, end_tasks

_BACKLOG = 1024
_FLUSH_TIMEOUT_S = 5.0

log = get_logger()


class GatewayService:
    """Serves HTTP until stopped.

    redis: the connection; the caller owns it. url: where it listens, empty until it does.
    """

    def __init__(self, redis: Redis, settings: GatewaySettings) -> None:
        records = Records(redis, retention=settings.retention)
        board = EventBoard(redis, records)
        self._settings = settings
        self._gateway = Gateway(
            settings=settings,
            records=records,
            board=board,
            fleet_watch=FleetWatch(redis),
            generation=Generation(records, board, max_open=settings.max_open_requests),
        )
        self._stopping = asyncio.Event()
        self.url = ""

    def stop(self) -> None:
        """Not ready any more, finish what is in flight, end; called again: end at once."""
        if self._stopping.is_set():
            self._gateway.may_leave.set()
        self._gateway.is_draining = True
        self._stopping.set()

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            ConfigurationError: The address can't be listened on.
        """
        runner = web.AppRunner(
            make_app(self._gateway),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=1.0,
        )
        await runner.setup()
        try:
            await self._listen(runner)
            async with TaskGroup() as tasks:
                background = [
                    tasks.create_task(self._gateway.fleet_watch.run(), name="fleet"),
                    tasks.create_task(self._gateway.board.read(), name="events"),
                    tasks.create_task(self._gateway.board.sweep(), name="sweep"),
                    tasks.create_task(self._gateway.generation.run(), name="cancellations"),
                ]
                await self._stopping.wait()
                await self._drain()
                await runner.cleanup()
                await self._flush()
                await end_tasks(background)
        finally:
            await runner.cleanup()

    async def _listen(self, runner: web.AppRunner) -> None:
        host, port = self._settings.host, self._settings.port
        try:
            await web.TCPSite(runner, host, port, backlog=_BACKLOG).start()
        except OSError as error:
            raise ConfigurationError(
                f"SYNERDIFF_HOST={host}, SYNERDIFF_PORT={port}: can't listen there: {error}"
            ) from error
        port = runner.addresses[0][1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("listening", url=self.url)

    async def _drain(self) -> None:
        """Let the clients in flight have their pictures, for as long as the settings allow."""
        log.info("draining", in_flight=self._gateway.num_in_flight)
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await self._gateway.may_leave.wait()
        except TimeoutError:
            log.warning("clients are left behind", in_flight=self._gateway.num_in_flight)

    async def _flush(self) -> None:
        try:
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                await self._gateway.generation.flush()
        except TimeoutError:
            log.warning("not everything that was abandoned could be cancelled")
