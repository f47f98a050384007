"""From what the scheduler knows of a device to a planning problem, and what its numbers stand for.

The window is the slots in flight, beside which more chunks may run, then the next slots, each
behind a gap in which chunks may be decoded alone. Decodes whose last step is in flight are planned
for from the next slot on, so that its shape leaves room for them. The window also looks behind:
what the last slots took beyond their share is deducted. Otherwise replanning at every slot would
spend in each slot the slack of the whole window.

Why decodes are planned for ahead: docs/decisions/0013-slots-leave-room-for-chunks.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from services.scheduler.core.state import Request
from services.scheduler.devices.drift import CHUNKS
from services.scheduler.planning.model import Option, Problem
from services.scheduler.planning.options import (
    InFlightStage,
    SlotTimings,
    WindowFacts,
    WindowRule,
    chunk_price,
    gap_options,
    in_flight_stage,
    slot_options,
)
from services.scheduler.planning.packing import Batch, pack_batches
from services.scheduler.planning.policy import Decode, DeviceView
from services.scheduler.planning.skipping import find_skippable, skippable_in, skippable_next

MAX_PLANNED_DECODES = 16
"""Decodes in a problem; more than a window can finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A problem and the things its numbers stand for."""

    problem: Problem
    """Its stages are those of `in_flight`, then gap, slot, gap, slot..."""
    in_flight: tuple[InFlightStage, ...]
    decodes: tuple[Decode, ...]
    """In the order of service."""
    requests: tuple[Request, ...]
    """Of the first slot; none where there is no slot to plan."""
    skippable: tuple[Request, ...]
    """Of them those that may skip, cheapest first."""
    timings: SlotTimings
    """Of the first slot."""
    first_alone_ms: float
    """Of the first slot, alone and unskipped."""
    alone_ms: float
    """Of the slots planned and those behind, likewise."""
    past_ms: float
    """Of the slots and gaps behind, those in flight included."""
    is_forced: bool
    """Whether the first decode is overdue."""

    @property
    def in_flight_ms(self) -> float:
        """Return what slots in flight take as they are; it is in the problem and in past_ms."""
        return sum(stage.base_ms for stage in self.in_flight)


def make_window(view: DeviceView, rule: WindowRule) -> Window | None:
    """Return the problem of the device's next slots and decodes under the view's threshold.

    None where there is no step to run and none in flight.
    """
    unet = view.unet
    batches = pack_batches(
        view.requests,
        unet,
        view.now,
        max_rows=rule.max_rows,
        num_slots=max(rule.num_slots - len(unet.slots), 1),
        may_skip=skippable_next(view.requests, unet.profile) if rule.skip else (),
    )
    if not batches and not unet.slots:
        return None
    decodes, is_overdue = _serving_order(view, rule)
    past = list(islice(reversed(unet.usage), rule.num_slots))
    # One gap between two slots is enough, or overdue decodes would shut the UNet out.
    is_forced = is_overdue and not (past and not past[0].alone_ms)
    num_running = sum(request.has_forwards_left for request in view.requests)
    mean_chunk_ms = fmean(decode.chunk_ms for decode in decodes) if decodes else 0.0
    facts = WindowFacts(
        durations=unet.durations,
        drift=unet.drift,
        decodes=decodes,
        chunk_ms=mean_chunk_ms * unet.drift.factor(CHUNKS),
        num_delayed=view.num_waiting + num_running,
        rule=rule,
    )
    in_flight = tuple(stage for slot in unet.slots if (stage := in_flight_stage(facts, slot)))
    gap = gap_options(facts, is_forced=is_forced)
    slots = _slot_stages(view, facts, batches, num_running)
    stages = (
        *(stage.options for stage in in_flight),
        *(options for slot in slots for options in (gap, slot.options)),
    )
    alone = [facts.alone_ms(batch.key.size, batch.rows) for batch in batches]
    past_ms = sum(usage.ms for usage in past)
    alone_ms = sum(alone) + sum(usage.alone_ms for usage in past)
    problem = Problem(
        stages=stages,
        remaining=tuple(decode.remaining for decode in decodes),
        budget_ms=alone_ms / unet.threshold.value
        - past_ms
        + sum(stage.base_ms for stage in in_flight),
        tail_ms=facts.chunk_ms,
        tail_price=chunk_price(stages[: len(in_flight) + 2], facts.num_delayed),
        must_grant=is_forced,
        num_ready=sum(decode.remaining for decode in decodes if not decode.is_coming),
        # The gap ahead of the first slot begins before anything else can come.
        all_ready_at=len(in_flight) + 1,
    )
    return Window(
        problem=problem,
        in_flight=in_flight,
        decodes=decodes,
        requests=batches[0].requests if batches else (),
        skippable=slots[0].skippable if slots else (),
        timings=slots[0].timings if slots else {},
        first_alone_ms=alone[0] if alone else 0.0,
        alone_ms=alone_ms,
        past_ms=past_ms,
        is_forced=is_forced,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _SlotStage:
    """One slot of the window: who may skip in it, its options, and how each is run."""

    skippable: tuple[Request, ...]
    options: tuple[Option, ...]
    timings: SlotTimings


def _slot_stages(
    view: DeviceView, facts: WindowFacts, batches: Sequence[Batch], num_running: int
) -> list[_SlotStage]:
    """Return the window's slots; those alike share their options, which speeds the planner up."""
    rule = facts.rule
    members = {request.request_id: request for batch in batches for request in batch.requests}
    skippable = (
        find_skippable(members.values(), view.unet.profile, base_price=rule.skip_price)
        if rule.skip
        else []
    )
    built: dict[object, tuple[tuple[Option, ...], SlotTimings]] = {}
    stages = []
    for i, batch in enumerate(batches):
        candidates = skippable_in(batch.requests, i, skippable)
        # A shorter slot serves those who wait for the UNet, and its own requests' rest.
        others = max(num_running - len(batch.requests), 0)
        batchmates = rule.batchmate_share * (len(batch.requests) - 1)
        num_waiting = view.num_waiting + others + batchmates
        alike = (batch.key, batch.rows, len(candidates), num_waiting)
        if alike not in built:
            built[alike] = slot_options(facts, batch, candidates, num_waiting)
        options, timings = built[alike]
        skipping = tuple(candidate.request for candidate in candidates)
        stages.append(_SlotStage(skippable=skipping, options=options, timings=timings))
    return stages


def _serving_order(view: DeviceView, rule: WindowRule) -> tuple[tuple[Decode, ...], bool]:
    """Return decodes with chunks left, and whether the first is overdue.

    Overdue ones go by age, then comes the least remaining work. Those at a VAE worker go before
    those that wait for one, and these before those that are still to come.
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

    pending = sorted((decode for decode in view.decodes if decode.remaining), key=order)
    must_grant = bool(pending) and pending[0].is_assigned and is_overdue(pending[0])
    return tuple(pending[:MAX_PLANNED_DECODES]), must_grant
