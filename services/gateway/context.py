"""What the handlers of one gateway share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from services.gateway.events import EventBoard
from services.gateway.fleet import Fleet
from services.gateway.fleet_watch import FleetWatch
from services.gateway.generation import Generation
from shared.settings import GatewaySettings
from shared.store.records import Records


@dataclass(slots=True, kw_only=True)
class Gateway:
    """What handlers share."""

    settings: GatewaySettings
    records: Records
    board: EventBoard
    fleet_watch: FleetWatch
    generation: Generation
    is_draining: bool = False
    """It takes no new pictures."""
    num_in_flight: int = 0
    """Clients that wait for pictures."""
    may_leave: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no client waits."""

    def __post_init__(self) -> None:
        """Nobody waits yet."""
        self.may_leave.set()

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a client that waits for its pictures."""
        self.num_in_flight += 1
        self.may_leave.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self.may_leave.set()

    @property
    def fleet(self) -> Fleet:
        """Return the latest look at workers, scheduler and store."""
        return self.fleet_watch.fleet

    def image_url(self, request: web.Request, request_id: str) -> str:
        """Return where a picture will be, as this client can reach it."""
        origin = self.settings.public_url or f"{request.scheme}://{request.host}"
        return f"{origin}/v1/images/{request_id}"


GATEWAY = web.AppKey("gateway", Gateway)
REQUEST_ID = web.RequestKey("request_id", str)
