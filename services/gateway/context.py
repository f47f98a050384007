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
from shared.records import Records
from shared.settings import GatewaySettings


@dataclass(slots=True, kw_only=True)
class Gateway:
    """is_draining: no new pictures. num_in_flight: clients that wait. may_leave: nobody waits."""

    settings: GatewaySettings
    records: Records
    board: EventBoard
    fleet_watch: FleetWatch
    generation: Generation
    is_draining: bool = False
    num_in_flight: int = 0
    may_leave: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        """Nobody waits yet."""
        self.may_leave.set()

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Counts a client that waits for its pictures."""
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
        """The latest look at workers, scheduler and store."""
        return self.fleet_watch.fleet

    def image_url(self, request: web.Request, request_id: str) -> str:
        """Where a picture will be, as this client can reach it."""
        origin = self.settings.public_url or f"{request.scheme}://{request.host}"
        return f"{origin}/v1/images/{request_id}"


GATEWAY = web.AppKey("gateway", Gateway)
REQUEST_ID = web.RequestKey("request_id", str)
