"""Who is next: owners take turns, and within an owner's share its most urgent request is first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import inf

from services.scheduler.core.state import Request

AGEING_S = 30.0
"""Waiting this long is worth one step of priority, so that nothing waits for ever."""


def by_urgency(requests: Iterable[Request], now: float) -> list[Request]:
    """Return one owner's requests, most urgent first.

    By priority, raised by waiting; within it by the earliest deadline that is still ahead; then by
    age, and by id.
    """
    return sorted(requests, key=lambda request: (_level(request, now), *_rank(request, now)))


def by_fair_share(
    requests: Iterable[Request], now: float, *, in_service: Iterable[Request] = ()
) -> list[Request]:
    """Return the requests with the owners taking turns.

    A request's turn is its place in its owner's own queue, behind what the owner has in service.
    Within a turn the earliest deadline goes first, then the oldest: nobody's priority counts
    against another owner.
    """
    num_ahead = Counter(request.request.owner for request in in_service)
    turns = []
    for request in by_urgency(requests, now):
        owner = request.request.owner
        # Ids are in it, so no two are alike and requests themselves are never compared.
        turns.append((num_ahead[owner], *_rank(request, now), request))
        num_ahead[owner] += 1
    turns.sort()
    return [request for *_, request in turns]


def _level(request: Request, now: float) -> int:
    """Return its priority's rank, raised by waiting; the least is first."""
    asked = request.request
    return -asked.priority - int(max(now - asked.submitted_at, 0.0) / AGEING_S)


def _rank(request: Request, now: float) -> tuple[float, float, str]:
    """Return what requests of the same rank are sorted by."""
    deadline_at = request.deadline_at if request.deadline_at > now else inf
    return deadline_at, request.request.submitted_at, request.request_id
