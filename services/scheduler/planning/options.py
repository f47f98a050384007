"""What a plan may choose from in each slot of its window, and in the gap ahead of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from services.scheduler.core.state import SlotInFlight
from services.scheduler.devices.drift import ALONE, BESIDE, CHUNKS, Drift
from services.scheduler.devices.durations import Durations, Timed
from services.scheduler.planning.model import Option
from services.scheduler.planning.packing import Batch
from services.scheduler.planning.policy import Decode
from services.scheduler.planning.skipping import Skippable

GAP_COUNTS = (1, 2, 4)
"""Chunks on offer in a gap, besides what is left of the first decodes."""

SlotTimings = dict[tuple[int, int], Timed]
"""The fastest way to run a slot, by the chunks beside it and the rows skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRule:
    """What a window is made of, and what a skipped row is worth."""

    max_rows: int = 0
    """The most rows of a slot; 0 leaves it to the profile."""
    num_slots: int = 4
    """UNet slots ahead; as many behind."""
    gap_overhead_ms: float = 3.0
    """What a gap costs beside its chunks: two messages."""
    max_decode_wait_s: float = 3.0
    """An older decode is granted regardless."""
    chunking: bool = True
    """Whether parts of decodes are on offer."""
    skip: bool = True
    """Whether skips are on offer."""
    skip_price: float = 0.5
    """A row is skipped where its saved time is worth more than so many times itself to those who
    wait."""
    batchmate_share: float = 1.0
    """How much of a waiting request one in the same slot counts as."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowFacts:
    """What all stages of a window go by."""

    durations: Durations
    drift: Drift
    decodes: Sequence[Decode]
    """Pending, in the order of service."""
    chunk_ms: float
    """Of their mean chunk, alone."""
    num_delayed: float
    """Requests that the UNet keeps waiting while anything else runs."""
    rule: WindowRule

    def alone_ms(self, size: str, rows: int) -> float:
        """Return the duration of a slot with nothing beside it."""
        return self.durations.alone(size, rows).ms * self.drift.factor(ALONE)

    def chunk_scale(self, size: str) -> float:
        """Return the pending chunks' duration over that of one of the slot's own size."""
        own_ms = self.durations.chunk_ms(size) * self.drift.factor(CHUNKS)
        return self.chunk_ms / own_ms if own_ms else 1.0

    def chunk_counts(self, size: str) -> tuple[int, ...]:
        """Return the numbers of chunks on offer beside a slot: whole decodes, if uncut."""
        if not self.rule.chunking:
            return (self.decodes[0].remaining,)
        return self.durations.chunk_counts(size)


def gap_options(facts: WindowFacts, *, is_forced: bool) -> tuple[Option, ...]:
    """Return nothing in no time, or some chunks alone; whole decodes only, where they are uncut.

    is_forced: the first decode is overdue and has to be among the chunks.
    """
    nothing = Option(chunks=0, skips=0, ms=0.0)
    if not facts.decodes:
        return (nothing,)
    whole = tuple(accumulate(islice((decode.remaining for decode in facts.decodes), 2)))
    counts = {whole[0], *GAP_COUNTS} if facts.rule.chunking else set(whole)
    if is_forced:
        counts = {whole[0]}
    options = [nothing]
    for count in sorted(counts):
        ms = count * facts.chunk_ms + facts.rule.gap_overhead_ms
        options.append(Option(chunks=count, skips=0, ms=ms, price=facts.num_delayed * ms))
    return tuple(options)


def slot_options(
    facts: WindowFacts, batch: Batch, candidates: Sequence[Skippable], num_waiting: float
) -> tuple[tuple[Option, ...], SlotTimings]:
    """Return every (chunks beside, skips) worth offering, and how each is run.

    candidates: who may skip, cheapest first. num_waiting: whom the time serves that skips save.
    """
    size, rows, durations = batch.key.size, batch.rows, facts.durations
    alone, beside = facts.drift.factor(ALONE), facts.drift.factor(BESIDE)
    scale = facts.chunk_scale(size)
    has_beside = facts.decodes and durations.chunk_counts(size)
    skips_on_offer = _skips_on_offer(facts, batch, candidates, num_waiting)
    timings = {
        (0, skips): durations.alone_with_room(size, rows - skips) for skips in skips_on_offer
    }
    alone_ms = {skips: timings[0, skips].ms * alone for skips in skips_on_offer}
    options = _unbeaten(
        Option(chunks=0, skips=skips, ms=alone_ms[skips], price=price)
        for skips, price in skips_on_offer.items()
    )
    for count in facts.chunk_counts(size) if has_beside else ():
        for skips in skips_on_offer:
            timings[count, skips] = durations.beside(size, rows - skips, count, scale)
        # Where chunks seem to make a slot faster, that is noise of the measuring.
        beside_ms = {
            skips: max(timings[count, skips].ms * beside, ms) for skips, ms in alone_ms.items()
        }
        options += _unbeaten(
            Option(
                chunks=count,
                skips=skips,
                ms=beside_ms[skips],
                price=price + facts.num_delayed * (beside_ms[skips] - alone_ms[skips]),
            )
            for skips, price in skips_on_offer.items()
        )
    return tuple(options), timings


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlightStage:
    """A slot in flight that more chunks may run beside."""

    slot: SlotInFlight
    options: tuple[Option, ...]
    """What it takes as it is, first, or with more chunks."""
    vae_threads: dict[int, int]
    """By the chunks added."""

    @property
    def base_ms(self) -> float:
        """Return what it takes as it is."""
        return self.options[0].ms


def in_flight_stage(facts: WindowFacts, slot: SlotInFlight) -> InFlightStage | None:
    """Return what may still be granted beside a slot that was sent; None where nothing may.

    It is taken as just begun.
    """
    size, rows, durations, rule = slot.key.size, slot.num_rows, facts.durations, facts.rule
    if slot.kind is None or not rows or all(decode.is_coming for decode in facts.decodes):
        return None
    if not durations.has_beside(size, slot.shape.threads_beside):
        return None
    scale = facts.chunk_scale(size)
    beside = facts.drift.factor(BESIDE)

    def timed(chunks: int) -> Timed:
        return durations.beside(size, rows, chunks, scale, shape=slot.shape)

    base_ms = timed(slot.chunks).ms * (beside if slot.chunks else facts.drift.factor(ALONE))
    options, vae_threads = [Option(chunks=0, skips=0, ms=base_ms)], {}
    for total in facts.chunk_counts(size):
        if total > slot.chunks and (rule.chunking or not slot.chunks):
            timing = timed(total)
            vae_threads[total - slot.chunks] = timing.kind.vae_threads
            extra_ms = max(timing.ms * beside - base_ms, 0.0)
            options.append(
                Option(
                    chunks=total - slot.chunks,
                    skips=0,
                    ms=base_ms + extra_ms,
                    price=facts.num_delayed * extra_ms,
                )
            )
    return InFlightStage(slot=slot, options=tuple(options), vae_threads=vae_threads)


def chunk_price(stages: Iterable[Sequence[Option]], num_delayed: float) -> float:
    """Return what a chunk costs at most, in ms times requests that wait, wherever it goes.

    It is asked for those that a plan leaves undone, too (docs/decisions/0010-everybodys-time.md).
    Were they charged the least, a plan would leave all that do not fit into the cheapest places,
    time after time, and decodes pile up.
    """
    most = 0.0
    for stage in stages:
        alone_ms = {option.skips: option.ms for option in stage if not option.chunks}
        for option in stage:
            if option.chunks and option.skips in alone_ms:
                most = max(most, (option.ms - alone_ms[option.skips]) / option.chunks)
    return most * num_delayed


def _skips_on_offer(
    facts: WindowFacts, batch: Batch, candidates: Sequence[Skippable], num_waiting: float
) -> dict[int, float]:
    """Return prices by numbers of skips, less what their time is worth.

    On offer are as few skips as may be, all, and half way between.
    """
    size, rows = batch.key.size, batch.rows
    least, most = min(batch.min_skips, len(candidates)), len(candidates)
    prices = tuple(accumulate((skippable.price for skippable in candidates), initial=0.0))
    offers = {}
    for skips in sorted({least, (least + most + 1) // 2, most}):
        saved_ms = facts.alone_ms(size, rows) - facts.alone_ms(size, rows - skips)
        mean_price = prices[skips] / skips if skips else 0.0
        offers[skips] = saved_ms * (mean_price - num_waiting)
    return offers


def _unbeaten(options: Iterable[Option]) -> list[Option]:
    """Return, of options with the same chunks, those that no other beats in time and price."""
    all_options = list(options)
    return [
        option
        for option in all_options
        if not any(other.ms < option.ms and other.price < option.price for other in all_options)
    ]
