"""The rows of the next slots: batch keys take turns by time, each slot is filled to the knee.

By which rows and whose turn: docs/decisions/0011-rows-that-run.md, 0015-turns-by-time.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from services.scheduler.core.state import BatchKey, Request, UnetWorker
from services.scheduler.planning.order import by_fair_share

MIN_ROWS = 2
"""A slot has room for one guided request, whatever the knee."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The requests of one slot, in the order in which they got their places."""

    key: BatchKey
    requests: tuple[Request, ...]
    rows: int
    """Of a full step of all of them."""
    min_skips: int = 0
    """Of the rows, that must be skipped for the slot to keep its limit."""


def pack_batches(
    requests: Sequence[Request],
    unet: UnetWorker,
    now: float,
    *,
    max_rows: int,
    num_slots: int,
    may_skip: Collection[str] = (),
) -> list[Batch]:
    """Return the batches of the next slots, as far as they can be known now.

    A later slot of a key repeats its batch, without those whose steps are over by then: the next
    plan will know who fills their places.

    may_skip: ids of requests whose next step may be skipped. Where not all requests fit in full,
    these take one row only, and others have the place.
    """
    candidates: dict[BatchKey, list[Request]] = {}
    for request in requests:
        if request.has_forwards_left:
            candidates.setdefault(request.batch_key, []).append(request)
    firsts: dict[BatchKey, Batch] = {}
    num_turns = dict.fromkeys(candidates, 0)
    turns = unet.turns
    batches: list[Batch] = []
    while num_turns and len(batches) < num_slots:
        key = min(num_turns, key=lambda key: (turns.start_ms(key), key))
        if key not in firsts:
            limit = max(MIN_ROWS, max_rows or unet.durations.knee(key.size))
            batch = firsts[key] = _fill(key, by_fair_share(candidates[key], now), limit, may_skip)
        else:
            later = _later(firsts[key], num_turns[key], len(candidates[key]))
            if later is None:
                del num_turns[key]
                continue
            batch = later
        batches.append(batch)
        num_turns[key] += 1
        turns = turns.after(key, unet.durations.alone(key.size, batch.rows).ms)
    return batches


def _later(first: Batch, turn: int, num_candidates: int) -> Batch | None:
    """Return a key's batch so many turns later; None where nobody's steps last so long."""
    lasting = tuple(
        request for request in first.requests if request.num_forwards - request.next_step > turn
    )
    if not lasting:
        return None
    # Where others wait they fill the gaps, so the slot stays as large.
    is_contended = num_candidates > len(first.requests)
    rows = first.rows if is_contended else sum(request.rows for request in lasting)
    return Batch(key=first.key, requests=lasting, rows=rows, min_skips=first.min_skips)


def _fill(
    key: BatchKey, requests: Sequence[Request], limit: int, may_skip: Collection[str]
) -> Batch:
    """Return the batch of as many of these requests as fit, in their order."""
    if sum(request.rows for request in requests) <= limit:
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
    rows = sum(request.rows for request in chosen)
    return Batch(key=key, requests=tuple(chosen), rows=rows, min_skips=max(rows - limit, 0))
