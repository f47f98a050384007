"""From what the scheduler knows to a planning problem, and what its solution means.

The window is the next slots, each behind a gap in which chunks may be decoded alone, and the last
slots already sent: what those took beyond their share is deducted. Without the look behind,
replanning at every slot would spend in each slot the slack of the whole window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from statistics import fmean

from services.scheduler.drift import ALONE, BESIDE, CHUNKS, Drift
from services.scheduler.packing import Batch, may_skip_next, skip_credits
from services.scheduler.planner import Option, Problem
from services.scheduler.policy import Decode, GroupView
from services.scheduler.profile import Profile, SlotKind
from services.scheduler.state import BatchKey, Request

GAP_COUNTS = (1, 2, 4)
"""Chunks on offer in a gap, besides what is left of the first decodes."""

MAX_PLANNED_DECODES = 16
"""Decodes in a problem; more than a window can finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRule:
    """What a window is made of, and what a skipped row is worth.

    num_slots: UNet slots ahead; as many behind. gap_overhead_ms: what a gap costs beside its
    chunks, two messages. max_decode_wait_s: an older decode is granted regardless. chunking: offer
    parts of decodes. skip: offer skips. skip_price: a row is skipped where its saved time is worth
    more than so many times itself to those who wait. batchmate_weight: how much of a waiting
    request one in the same slot counts as.
    """

    num_slots: int = 4
    gap_overhead_ms: float = 3.0
    max_decode_wait_s: float = 3.0
    chunking: bool = True
    skip: bool = True
    skip_price: float = 0.5
    batchmate_weight: float = 1.0


_Kinds = dict[int, SlotKind]
_SkippableById = dict[str, "_Skippable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A problem and the things its numbers stand for.

    stages of the problem alternate: gap, slot, gap, slot... decodes: in the order of service.
    skippable: requests of the first slot that may skip, cheapest first. kinds: of the first slot,
    by the chunks beside it. alone_ms: of the planned slots. past_ms, past_alone_ms: of those
    behind. first_alone_ms: of the first slot.
    """

    problem: Problem
    decodes: tuple[Decode, ...]
    skippable: tuple[Request, ...]
    kinds: _Kinds
    alone_ms: float
    first_alone_ms: float
    past_ms: float
    past_alone_ms: float
    is_forced: bool


def make_window(view: GroupView, batches: Sequence[Batch], rule: WindowRule) -> Window:
    """The problem of serving these batches and the view's decodes under the view's threshold."""
    unet = view.unet
    times = _Times(profile=unet.profile, drift=unet.drift)
    decodes, is_overdue = _serving_order(view, rule)
    chunk_ms = times.mean_chunk_ms(decodes)
    past = list(islice(reversed(unet.ledger), rule.num_slots))
    # One gap between two slots is enough, or overdue decodes would shut the UNet out.
    is_forced = is_overdue and not (past and past[0][1] == 0)
    gap = _gap_options(decodes, chunk_ms, rule, is_forced=is_forced)
    stages: list[tuple[Option, ...]] = []
    skippable: tuple[Request, ...] = ()
    kinds: _Kinds = {}
    alone = []
    built: dict[tuple[BatchKey, int, int, float], tuple[tuple[Option, ...], _Kinds]] = {}
    may_skip = _find_skippable(view, batches, rule)
    num_running = sum(one.has_forwards_left for one in view.requests)
    for i, batch in enumerate(batches):
        candidates = _skip_candidates(batch, i, may_skip)
        num_waiting = _num_waiting(view, num_running, batch, rule)
        alike = (batch.key, batch.rows, len(candidates), num_waiting)
        if alike not in built:
            built[alike] = _slot_options(
                times,
                batch,
                candidates,
                decodes,
                chunk_ms=chunk_ms,
                num_waiting=num_waiting,
                rule=rule,
            )
        options, slot_kinds = built[alike]
        if i == 0:
            skippable, kinds = tuple(request for request, _ in candidates), slot_kinds
        stages += [gap, options]
        alone.append(times.alone_ms(batch.key.size, batch.rows))
    past_ms, past_alone_ms = sum(ms for ms, _ in past), sum(ms for _, ms in past)
    budget_ms = (sum(alone) + past_alone_ms) / unet.threshold.value - past_ms
    problem = Problem(
        stages=tuple(stages),
        remaining=tuple(one.remaining for one in decodes),
        budget_ms=budget_ms,
        tail_ms=chunk_ms,
        must_grant=is_forced,
    )
    return Window(
        problem=problem,
        decodes=decodes,
        skippable=skippable,
        kinds=kinds,
        alone_ms=sum(alone),
        first_alone_ms=alone[0],
        past_ms=past_ms,
        past_alone_ms=past_alone_ms,
        is_forced=is_forced,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """The profile's durations as they have drifted, in ms."""

    profile: Profile
    drift: Drift

    def alone_ms(self, size: str, rows: int) -> float:
        kind = self.profile.alone_kind(size)
        return self.profile.slot_ms(size, rows, kind)[0] * self.drift.factor(ALONE)

    def mean_chunk_ms(self, decodes: Sequence[Decode]) -> float:
        if not decodes:
            return 0.0
        return fmean(one.chunk_ms for one in decodes) * self.drift.factor(CHUNKS)

    def beside_ms(self, size: str, rows: int, kind: SlotKind, chunks: int, weight: float) -> float:
        """Of a slot with `chunks` of `weight` times the size's own beside it: the longer side.

        More chunks than the kind was measured with slow the slot on as the measured ones did.
        """
        step_ms, chunks_ms = self.profile.slot_ms(size, rows, kind)
        work = chunks * weight / kind.chunks
        if work > 1:
            alone_ms = self.profile.slot_ms(size, rows, self.profile.alone_kind(size))[0]
            step_ms += (work - 1) * max(step_ms - alone_ms, 0.0)
        return max(step_ms, chunks_ms * work) * self.drift.factor(BESIDE)

    def chunk_weight(self, size: str, chunk_ms: float) -> float:
        """A pending chunk in terms of one of the slot's own picture size."""
        own = self.profile.decode(size)
        own_ms = fmean(own.chunk_ms) * self.drift.factor(CHUNKS) if own else 0.0
        return chunk_ms / own_ms if own_ms else 1.0


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


def _gap_options(
    decodes: Sequence[Decode], chunk_ms: float, rule: WindowRule, *, is_forced: bool
) -> tuple[Option, ...]:
    whole = tuple(accumulate(islice((one.remaining for one in decodes), 2)))
    counts = {whole[0], *GAP_COUNTS} if rule.chunking and whole else set(whole)
    if is_forced:
        counts = set(whole[:1])
    nothing = Option(chunks=0, skips=0, ms=0.0)
    if not decodes:
        return (nothing,)
    return (
        nothing,
        *(
            Option(chunks=count, skips=0, ms=count * chunk_ms + rule.gap_overhead_ms)
            for count in sorted(counts)
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Skippable:
    """A request whose guidance may be skipped. budget: steps; price: of one, over its own time."""

    request: Request
    budget: int
    price: float
    is_next: bool


def _find_skippable(view: GroupView, batches: Sequence[Batch], rule: WindowRule) -> _SkippableById:
    """Of the window's requests, by id.

    The price rises with the error last measured and with the share of the budget already spent.
    """
    found: _SkippableById = {}
    if not rule.skip:
        return found
    seen: set[str] = set()
    for batch in batches:
        for request in batch.requests:
            if request.request_id in seen:
                continue
            seen.add(request.request_id)
            is_next = may_skip_next(request)
            if not is_next and not request.has_skipped_before:
                continue
            budget = skip_credits(request, view.unet.profile)
            if budget:
                spent = request.num_skipped / (request.num_skipped + budget)
                price = rule.skip_price * (0.5 + 0.5 * spent + min(request.skip_error, 1.0))
                found[request.request_id] = _Skippable(
                    request=request, budget=budget, price=price, is_next=is_next
                )
    return found


def _skip_candidates(
    batch: Batch, index: int, skippable: _SkippableById
) -> list[tuple[Request, float]]:
    """Requests of the window's slot `index` that may skip there, with their price, cheapest first.

    Later slots assume that who may skip now, or did before, may skip then, as far as the budget
    reaches.
    """
    candidates = []
    for request in batch.requests:
        one = skippable.get(request.request_id)
        if one and one.budget > index and (one.is_next or index):
            candidates.append((request, one.price))
    candidates.sort(key=lambda pair: (pair[1], pair[0].request_id))
    return candidates


def _num_waiting(view: GroupView, num_running: int, batch: Batch, rule: WindowRule) -> float:
    """Whom a shorter slot serves: those who wait for the UNet, and a little its other requests."""
    others = num_running - len(batch.requests)
    return view.num_waiting + max(others, 0) + rule.batchmate_weight * (len(batch.requests) - 1)


def _slot_options(
    times: _Times,
    batch: Batch,
    candidates: Sequence[tuple[Request, float]],
    decodes: Sequence[Decode],
    *,
    chunk_ms: float,
    num_waiting: float,
    rule: WindowRule,
) -> tuple[tuple[Option, ...], _Kinds]:
    """Every (chunks beside, skips) on offer; and the fastest kind for each number of chunks."""
    size = batch.key.size
    full_ms = times.alone_ms(size, batch.rows)
    weight = times.chunk_weight(size, chunk_ms)
    beside = times.profile.beside_kinds(size) if decodes else ()
    whole = decodes[0].remaining if decodes else 0
    counts = sorted({kind.chunks for kind in beside}) if rule.chunking else [whole] * bool(beside)
    kinds = {0: times.profile.alone_kind(size)}
    for count in counts:
        # Of the kinds measured with as many chunks, or the most below, the fastest.
        known = max(
            (kind.chunks for kind in beside if kind.chunks <= count),
            default=min(kind.chunks for kind in beside),
        )
        kinds[count] = min(
            (kind for kind in beside if kind.chunks == known),
            key=lambda kind: (times.beside_ms(size, batch.rows, kind, count, weight), kind),
        )
    num_skips = len(candidates)
    options = []
    for skips in sorted({0, (num_skips + 1) // 2, num_skips}):
        rows = batch.rows - skips
        saved_ms = full_ms - times.alone_ms(size, rows)
        price = sum(price for _, price in candidates[:skips]) / skips if skips else 0.0
        for count, kind in kinds.items():
            ms = (
                times.beside_ms(size, rows, kind, count, weight)
                if count
                else times.alone_ms(size, rows)
            )
            options.append(
                Option(chunks=count, skips=skips, ms=ms, price=saved_ms * (price - num_waiting))
            )
    return tuple(one for one in options if not _is_beaten(one, options)), kinds


def _is_beaten(option: Option, others: Sequence[Option]) -> bool:
    """Whether another does as many chunks in less time and for a lower price."""
    return any(
        other.chunks == option.chunks and other.ms < option.ms and other.price < option.price
        for other in others
    )
