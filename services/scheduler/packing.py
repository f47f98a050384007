"""Who is next: the order of requests, and the rows of the next slots."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf

from services.scheduler.state import BatchKey, Request, UnetWorker

AGEING_S = 30.0
"""Waiting this long is worth one step of priority, so that nothing waits for ever."""

MIN_ROWS = 2
"""A slot has room for one guided request, whatever the knee."""


def urgency(request: Request, now: float) -> tuple[int, float, float, str]:
    """What requests are sorted by, most urgent first.

    Priority, raised by waiting; within it the earliest deadline that is still ahead; then age.
    """
    asked = request.request
    deadline_at = inf
    if asked.deadline_ms and request.deadline_at > now:
        deadline_at = request.deadline_at
    return (
        -asked.priority - int(max(now - asked.submitted_at, 0.0) / AGEING_S),
        deadline_at,
        asked.submitted_at,
        asked.request_id,
    )


def by_urgency(requests: Iterable[Request], now: float) -> list[Request]:
    """Most urgent first; ties by age, then by id."""
    return sorted(requests, key=lambda request: urgency(request, now))


def by_fair_share(
    waiting: Iterable[Request], in_service: Iterable[Request], now: float
) -> list[Request]:
    """The order of admission: within a priority, owners take turns.

    A request's turn is its place in its owner's own queue, behind what the owner has in service.
    """
    num_ahead: dict[str, int] = {}
    for request in in_service:
        num_ahead[request.request.owner] = num_ahead.get(request.request.owner, 0) + 1
    turns = []
    # Ids are in it, so no two are alike and requests themselves are never compared.
    for (level, *rest), request in sorted((urgency(one, now), one) for one in waiting):
        owner = request.request.owner
        turn = num_ahead.get(owner, 0)
        num_ahead[owner] = turn + 1
        turns.append(((level, turn, *rest), request))
    turns.sort(key=lambda pair: pair[0])
    return [request for _, request in turns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The requests of one slot, most urgent first.

    rows: of a full step of all of them. min_skips: of them, that must be skipped for the slot to
    keep its limit.
    """

    key: BatchKey
    requests: tuple[Request, ...]
    rows: int
    min_skips: int = 0


def pack_batches(
    requests: Sequence[Request],
    unet: UnetWorker,
    now: float,
    *,
    max_rows: int,
    num_slots: int,
    may_skip: Collection[str] = (),
) -> list[Batch]:
    """The batches of the next slots: batch keys take turns, each filled to the knee.

    The batch key that has waited longest (in slots) goes first, so with K keys each has a slot at
    least every K slots. A later slot of the same key repeats its batch, without those whose steps
    are over by then: the next plan will know who fills their places.

    may_skip: ids of requests whose next step may be skipped. Where not all requests fit in full,
    these take one row only, and others have the place.
    """
    candidates: dict[BatchKey, list[Request]] = {}
    for request in requests:
        if request.has_forwards_left:
            candidates.setdefault(request.batch_key, []).append(request)
    if not candidates:
        return []
    keys = sorted(candidates, key=lambda key: (unet.turns.get(key, -1), key))
    batches: list[Batch] = []
    firsts: dict[BatchKey, Batch] = {}
    for i in range(num_slots):
        key = keys[i % len(keys)]
        turn = i // len(keys)
        if turn == 0:
            limit = max(MIN_ROWS, max_rows or unet.profile.knee(key.size))
            firsts[key] = _fill(key, by_urgency(candidates[key], now), limit, may_skip)
            batches.append(firsts[key])
            continue
        lasting = tuple(
            one for one in firsts[key].requests if one.num_forwards - one.next_step > turn
        )
        if not lasting:
            break
        rows = sum(one.rows for one in lasting)
        # Where others wait they fill the gaps, so the slot stays as large.
        is_contended = len(candidates[key]) > len(firsts[key].requests)
        rows = firsts[key].rows if is_contended else rows
        batches.append(Batch(key=key, requests=lasting, rows=rows, min_skips=firsts[key].min_skips))
    return batches


def _fill(
    key: BatchKey, requests: Sequence[Request], limit: int, may_skip: Collection[str]
) -> Batch:
    if sum(one.rows for one in requests) <= limit:
        may_skip = ()
    chosen: list[Request] = []
    used = 0
    for request in requests:
        rows = 1 if request.request_id in may_skip else request.rows
        if used + rows <= limit:
            chosen.append(request)
            used += rows
            if used == limit:
                break
    rows = sum(one.rows for one in chosen)
    return Batch(key=key, requests=tuple(chosen), rows=rows, min_skips=max(rows - limit, 0))
