"""From what the scheduler knows to a planning problem, and what its solution means.

The window is the slots in flight, beside which more chunks may run, then the next slots, each
behind a gap in which chunks may be decoded alone. It also looks behind: what the last slots took
beyond their share is deducted. Otherwise replanning at every slot would spend in each slot the
slack of the whole window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from services.scheduler.options import (
    InFlight,
    Kinds,
    Times,
    WindowRule,
    chunk_price,
    gap_options,
    in_flight,
    slot_options,
)
from services.scheduler.packing import Batch
from services.scheduler.planner import Option, Problem
from services.scheduler.policy import Decode, GroupView
from services.scheduler.profile import SlotKind
from services.scheduler.skipping import Skippable, find_skippable, skippable_in
from services.scheduler.state import BatchKey, Request

MAX_PLANNED_DECODES = 16
"""Decodes in a problem; more than a window can finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A problem and the things its numbers stand for.

    stages of the problem: those of `in_flight`, then gap, slot, gap, slot... decodes: in the order
    of service. skippable: requests of the first slot that may skip, cheapest first. kinds: of the
    first slot. kind_for_latecomers: of it with chunks that are not known of yet. alone_ms: of the
    planned slots. past_ms, past_alone_ms: of those behind, with the slots in flight.
    first_alone_ms: of the first slot. is_forced: the first decode is overdue.
    """

    problem: Problem
    in_flight: tuple[InFlight, ...]
    decodes: tuple[Decode, ...]
    skippable: tuple[Request, ...]
    kinds: Kinds
    kind_for_latecomers: SlotKind | None
    alone_ms: float
    first_alone_ms: float
    past_ms: float
    past_alone_ms: float
    is_forced: bool

    def beside_kind(self, chunks: int) -> SlotKind | None:
        """The first slot's with so many chunks beside it, or with a few that may still come."""
        if chunks:
            return self.kinds[chunks]
        return self.kind_for_latecomers

    @property
    def in_flight_ms(self) -> float:
        """Of the slots in flight as they are; in the problem's times and among those behind."""
        return sum(one.base_ms for one in self.in_flight)


def make_window(view: GroupView, batches: Sequence[Batch], rule: WindowRule) -> Window:
    """The problem of serving these batches and the view's decodes under the view's threshold.

    batches: may be none; then only the slots in flight are planned for.
    """
    unet = view.unet
    times = Times(durations=unet.durations, drift=unet.drift)
    decodes, is_overdue = _serving_order(view, rule)
    chunk_ms = times.mean_chunk_ms(decodes)
    past = list(islice(reversed(unet.ledger), rule.num_slots))
    # One gap between two slots is enough, or overdue decodes would shut the UNet out.
    is_forced = is_overdue and not (past and not past[0].alone_ms)
    num_running = sum(one.has_forwards_left for one in view.requests)
    num_delayed = view.num_waiting + num_running
    gap = gap_options(decodes, chunk_ms, rule, num_delayed=num_delayed, is_forced=is_forced)
    slots = _slots(
        view, batches, decodes, times, chunk_ms=chunk_ms, num_running=num_running, rule=rule
    )
    sent = tuple(
        found
        for slot in unet.slots
        if (
            found := in_flight(
                times, slot, decodes, chunk_ms=chunk_ms, num_delayed=num_delayed, rule=rule
            )
        )
    )
    stages = (
        *(one.options for one in sent),
        *(stage for slot in slots for stage in (gap, slot.options)),
    )
    alone = [times.alone_ms(batch.key.size, batch.rows) for batch in batches]
    past_ms, past_alone_ms = sum(one.ms for one in past), sum(one.alone_ms for one in past)
    problem = Problem(
        stages=stages,
        remaining=tuple(one.remaining for one in decodes),
        budget_ms=(sum(alone) + past_alone_ms) / unet.threshold.value
        - past_ms
        + sum(one.base_ms for one in sent),
        tail_ms=chunk_ms,
        tail_price=chunk_price(stages[: len(sent) + 2], num_delayed),
        must_grant=is_forced,
    )
    return Window(
        problem=problem,
        in_flight=sent,
        decodes=decodes,
        skippable=tuple(one.request for one in slots[0].skippable) if slots else (),
        kinds=slots[0].kinds if slots else {},
        kind_for_latecomers=_kind_for_latecomers(times, batches[0]) if batches else None,
        alone_ms=sum(alone),
        first_alone_ms=alone[0] if alone else 0.0,
        past_ms=past_ms,
        past_alone_ms=past_alone_ms,
        is_forced=is_forced,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """One slot of the window: who may skip in it, its options, and their kinds by chunks."""

    skippable: Sequence[Skippable]
    options: tuple[Option, ...]
    kinds: Kinds


def _slots(
    view: GroupView,
    batches: Sequence[Batch],
    decodes: Sequence[Decode],
    times: Times,
    *,
    chunk_ms: float,
    num_running: int,
    rule: WindowRule,
) -> list[_Slot]:
    """The window's slots. Those alike share their options, which the planner makes use of."""
    skippable: list[Skippable] = []
    if rule.skip:
        members = {one.request_id: one for batch in batches for one in batch.requests}
        skippable = find_skippable(members.values(), view.unet.profile, base_price=rule.skip_price)
    built: dict[tuple[BatchKey, int, int, float], tuple[tuple[Option, ...], Kinds]] = {}
    slots = []
    for i, batch in enumerate(batches):
        candidates = skippable_in(batch.requests, i, skippable)
        num_waiting = _num_waiting(view, num_running, batch, rule)
        alike = (batch.key, batch.rows, len(candidates), num_waiting)
        if alike not in built:
            built[alike] = slot_options(
                times,
                batch,
                candidates,
                decodes,
                chunk_ms=chunk_ms,
                num_waiting=num_waiting,
                num_delayed=view.num_waiting + num_running,
                rule=rule,
            )
        options, kinds = built[alike]
        slots.append(_Slot(skippable=candidates, options=options, kinds=kinds))
    return slots


def _kind_for_latecomers(times: Times, batch: Batch) -> SlotKind | None:
    """Of a slot beside as few chunks as any; None where nothing runs beside slots."""
    counts = times.durations.chunk_counts(batch.key.size)
    if not counts:
        return None
    return times.durations.beside(batch.key.size, batch.rows, counts[0], 1.0)[0]


def _num_waiting(view: GroupView, num_running: int, batch: Batch, rule: WindowRule) -> float:
    """Whom a shorter slot serves: those who wait for the UNet, and its own requests' rest."""
    others = num_running - len(batch.requests)
    return view.num_waiting + max(others, 0) + rule.batchmate_weight * (len(batch.requests) - 1)


def _serving_order(view: GroupView, rule: WindowRule) -> tuple[tuple[Decode, ...], bool]:
    """Decodes with chunks left: overdue ones by age, then the least remaining work first.

    Those at a VAE worker go before those that wait for one. Also whether one is overdue.
    """

    def order(decode: Decode) -> tuple[bool, bool, float, float, str]:
        at = decode.request.latents_at
        overdue = view.now - at > rule.max_decode_wait_s
        work = 0.0 if overdue else decode.remaining * decode.chunk_ms
        return (not decode.is_assigned, not overdue, work, at, decode.request.request_id)

    pending = sorted((one for one in view.decodes if one.remaining), key=order)
    is_overdue = bool(pending) and (
        view.now - pending[0].request.latents_at > rule.max_decode_wait_s
    )
    return tuple(pending[:MAX_PLANNED_DECODES]), is_overdue and pending[0].is_assigned
