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
    return [request for *_, request in _by_urgency(requests, now)]


def by_fair_share(
    requests: Iterable[Request], now: float, *, in_service: Iterable[Request] = ()
) -> list[Request]:
    """Return the requests with the owners taking turns.

    A request's turn is its place in its owner's own queue, behind what the owner has in service.
    Within a turn the earliest deadline goes first, then the oldest: nobody's priority counts
    against another owner.
    """
    ordered = _by_urgency(requests, now)
    if len({request.request.owner for *_, request in ordered}) <= 1:
        return [request for *_, request in ordered]
    num_ahead = Counter(request.request.owner for request in in_service)
    turns = []
    for _, deadline_at, submitted_at, name, request in ordered:
        owner = request.request.owner
        turns.append((num_ahead[owner], deadline_at, submitted_at, name, request))
        num_ahead[owner] += 1
    turns.sort()
    return [request for *_, request in turns]


_Ranked = tuple[int, float, float, str, Request]
"""What requests are sorted by; ids are in it, so requests themselves are never compared."""


def _by_urgency(requests: Iterable[Request], now: float) -> list[_Ranked]:
    ranked = []
    for request in requests:
        asked = request.request
        raised = int(max(now - asked.submitted_at, 0.0) / AGEING_S)
        deadline_at = request.deadline_at if asked.deadline_ms else inf
        deadline_at = deadline_at if deadline_at > now else inf
        ranked.append(
            (-asked.priority - raised, deadline_at, asked.submitted_at, asked.request_id, request)
        )
    ranked.sort()
    return ranked
