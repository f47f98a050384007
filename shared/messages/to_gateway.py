"""What all gateways hear of requests; the records hold the truth."""

from __future__ import annotations

from dataclasses import dataclass

from shared.messages.parts import RequestProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsProgressed:
    """Progress of every request that a slot or an admission has moved."""

    items: tuple[RequestProgress, ...]
    """One for each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFinished:
    """A request has its final state. Read its record."""

    request_id: str
    state: str
    """"done", "failed" or "cancelled"."""


ToGateway = RequestsProgressed | RequestFinished
