"""The gateway as a service: its background tasks, its port, its end."""

from __future__ import annotations

import asyncio
import ipaddress

from redis.asyncio import Redis

from services.gateway.admission import WaitLimits
from services.gateway.app import make_app
from services.gateway.context import Gateway
from services.gateway.events import EventBoard
from services.gateway.fleet_watch import FleetWatch
from services.gateway.generation import Generation
from services.gateway.http_server import HttpServer
from shared.errors import ConfigurationError
from shared.logs import get_logger
from shared.records import Records
from shared.settings import GatewaySettings
from shared.tasks import TaskGroup, end_tasks

_FLUSH_TIMEOUT_S = 5.0

log = get_logger()


class GatewayService:
    """Serves HTTP until stopped.

    redis: the connection; the caller owns it. url: where it listens, empty until it does.
    """

    def __init__(self, redis: Redis, settings: GatewaySettings) -> None:
        records = Records(redis, retention=settings.retention)
        board = EventBoard(redis, records)
        fleet_watch = FleetWatch(redis)
        limits = WaitLimits(max_wait_s=settings.wait_limit_s, timeout_s=settings.request_timeout_s)
        self._settings = settings
        self._gateway = Gateway(
            settings=settings,
            records=records,
            board=board,
            fleet_watch=fleet_watch,
            generation=Generation(
                records,
                board,
                fleet_watch,
                max_open=settings.max_open_requests,
                limits=limits,
            ),
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
        server = HttpServer(make_app(self._gateway))
        try:
            await self._listen(server)
            async with TaskGroup() as tasks:
                background = [
                    tasks.create_task(self._gateway.fleet_watch.run(), name="fleet"),
                    tasks.create_task(self._gateway.board.read(), name="events"),
                    tasks.create_task(self._gateway.board.sweep(), name="sweep"),
                    tasks.create_task(self._gateway.generation.run(), name="cancellations"),
                ]
                await self._stopping.wait()
                await self._drain()
                await server.close()
                await self._flush()
                await end_tasks(background)
        finally:
            await server.close()

    async def _listen(self, server: HttpServer) -> None:
        host, port = self._settings.host, self._settings.port
        try:
            port = await server.listen(host, port)
        except (OSError, UnicodeError) as error:
            raise ConfigurationError(
                f"SYNERDIFF_HOST={host}, SYNERDIFF_PORT={port}: can't listen there: {error}"
            ) from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("listening", url=self.url)
        if not _is_loopback(host):
            log.warning(
                "reachable from other machines, without keys: whoever reaches this port can make "
                "pictures, and read or cancel any whose id they know",
                host=host or "all addresses",
            )

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


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on an address or on `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
