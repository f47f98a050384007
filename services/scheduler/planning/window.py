"""From what the scheduler knows to a planning problem, and what its solution means.

The window is the slots in flight, beside which more chunks may run, then the next slots, each
behind a gap in which chunks may be decoded alone. Decodes whose last step is in flight are planned
for from the next slot on, so that its shape leaves room for them. The window also looks behind:
what the last slots took beyond their share is deducted. Otherwise replanning at every slot would
spend in each slot the slack of the whole window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from services.scheduler.core.state import BatchKey, Request
from services.scheduler.planning.options import (
    InFlight,
    Times,
    Ways,
    WindowRule,
    chunk_price,
    gap_options,
    in_flight,
    slot_options,
)
from services.scheduler.planning.packing import Batch
from services.scheduler.planning.planner import Option, Problem
from services.scheduler.planning.policy import Decode, GroupView
from services.scheduler.planning.skipping import Skippable, find_skippable, skippable_in

MAX_PLANNED_DECODES = 16
"""Decodes in a problem; more than a window can finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A problem and the things its numbers stand for.

    stages of the problem: those of `in_flight`, then gap, slot, gap, slot... decodes: in the order
    of service. skippable: requests of the first slot that may skip, cheapest first. ways: to run
    the first slot. alone_ms: of the planned slots. past_ms, past_alone_ms: of those behind, with
    the slots in flight. first_alone_ms: of the first slot. is_forced: the first decode is overdue.
    """

    problem: Problem
    in_flight: tuple[InFlight, ...]
    decodes: tuple[Decode, ...]
    skippable: tuple[Request, ...]
    ways: Ways
    alone_ms: float
    first_alone_ms: float
    past_ms: float
    past_alone_ms: float
    is_forced: bool

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
        num_ready=sum(one.remaining for one in decodes if not one.is_coming),
        # The gap ahead of the first slot begins before anything else can come.
        all_ready_at=len(sent) + 1,
    )
    return Window(
        problem=problem,
        in_flight=sent,
        decodes=decodes,
        skippable=tuple(one.request for one in slots[0].skippable) if slots else (),
        ways=slots[0].ways if slots else {},
        alone_ms=sum(alone),
        first_alone_ms=alone[0] if alone else 0.0,
        past_ms=past_ms,
        past_alone_ms=past_alone_ms,
        is_forced=is_forced,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """One slot of the window: who may skip in it, its options, and the ways to run it."""

    skippable: Sequence[Skippable]
    options: tuple[Option, ...]
    ways: Ways


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
    built: dict[tuple[BatchKey, int, int, float], tuple[tuple[Option, ...], Ways]] = {}
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
        options, ways = built[alike]
        slots.append(_Slot(skippable=candidates, options=options, ways=ways))
    return slots


def _num_waiting(view: GroupView, num_running: int, batch: Batch, rule: WindowRule) -> float:
    """Whom a shorter slot serves: those who wait for the UNet, and its own requests' rest."""
    others = num_running - len(batch.requests)
    return view.num_waiting + max(others, 0) + rule.batchmate_weight * (len(batch.requests) - 1)


def _serving_order(view: GroupView, rule: WindowRule) -> tuple[tuple[Decode, ...], bool]:
    """Decodes with chunks left: overdue ones by age, then the least remaining work first.

    Those at a VAE worker go before those that wait for one, and these before those that are still
    to come. Also whether one is overdue.
    """

    def is_overdue(decode: Decode) -> bool:
        request = decode.request
        return bool(request.latents) and view.now - request.latents_at > rule.max_decode_wait_s

    def order(decode: Decode) -> tuple[bool, bool, bool, float, float, str]:
        at = decode.request.latents_at if decode.request.latents else view.now
        overdue = is_overdue(decode)
        work = 0.0 if overdue else decode.remaining * decode.chunk_ms
        name = decode.request.request_id
        return (not decode.is_assigned, decode.is_coming, not overdue, work, at, name)

    pending = sorted((one for one in view.decodes if one.remaining), key=order)
    must_grant = bool(pending) and pending[0].is_assigned and is_overdue(pending[0])
    return tuple(pending[:MAX_PLANNED_DECODES]), must_grant
