"""What a plan may choose from in each slot of its window, and in the gap ahead of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from statistics import fmean

from services.scheduler.core.state import SlotInFlight
from services.scheduler.devices.drift import ALONE, BESIDE, CHUNKS, Drift
from services.scheduler.devices.durations import Durations, Timed
from services.scheduler.planning.packing import Batch
from services.scheduler.planning.planner import Option
from services.scheduler.planning.policy import Decode
from services.scheduler.planning.skipping import Skippable

GAP_COUNTS = (1, 2, 4)
"""Chunks on offer in a gap, besides what is left of the first decodes."""

Ways = dict[tuple[int, int], Timed]
"""The fastest way to run a slot, by the chunks beside it and the rows skipped."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """A device's durations as they have drifted, in ms."""

    durations: Durations
    drift: Drift

    def alone_ms(self, size: str, rows: int) -> float:
        """Of a slot with nothing beside it."""
        return self.durations.alone(size, rows).ms * self.drift.factor(ALONE)

    def mean_chunk_ms(self, decodes: Sequence[Decode]) -> float:
        """Of those decodes, alone; 0 for none."""
        if not decodes:
            return 0.0
        return fmean(one.chunk_ms for one in decodes) * self.drift.factor(CHUNKS)

    def chunk_weight(self, size: str, chunk_ms: float) -> float:
        """A pending chunk in terms of one of the slot's own picture size."""
        own_ms = self.durations.chunk_ms(size) * self.drift.factor(CHUNKS)
        return chunk_ms / own_ms if own_ms else 1.0


def gap_options(
    decodes: Sequence[Decode],
    chunk_ms: float,
    rule: WindowRule,
    *,
    num_delayed: float,
    is_forced: bool,
) -> tuple[Option, ...]:
    """Nothing in no time, or some chunks alone; whole decodes only, where they can't be cut.

    num_delayed: whom the UNet keeps waiting meanwhile.
    """
    nothing = Option(chunks=0, skips=0, ms=0.0)
    if not decodes:
        return (nothing,)
    whole = tuple(accumulate(islice((one.remaining for one in decodes), 2)))
    counts = {whole[0], *GAP_COUNTS} if rule.chunking else set(whole)
    if is_forced:
        counts = {whole[0]}
    options = [nothing]
    for count in sorted(counts):
        ms = count * chunk_ms + rule.gap_overhead_ms
        options.append(Option(chunks=count, skips=0, ms=ms, price=num_delayed * ms))
    return tuple(options)


def slot_options(
    times: Times,
    batch: Batch,
    candidates: Sequence[Skippable],
    decodes: Sequence[Decode],
    *,
    chunk_ms: float,
    num_waiting: float,
    num_delayed: float,
    rule: WindowRule,
) -> tuple[tuple[Option, ...], Ways]:
    """Every (chunks beside, skips) worth offering, and the way to run each.

    num_waiting: whom the time serves that skips save. num_delayed: whom the time costs that chunks
    add to the slot.
    """
    size, rows, durations = batch.key.size, batch.rows, times.durations
    alone, beside = times.drift.factor(ALONE), times.drift.factor(BESIDE)
    weight = times.chunk_weight(size, chunk_ms)
    counts: tuple[int, ...] = ()
    if decodes and durations.chunk_counts(size):
        counts = durations.chunk_counts(size) if rule.chunking else (decodes[0].remaining,)
    skips_on_offer = _skips_on_offer(times, batch, candidates, num_waiting)
    ways = {
        (0, skips): durations.open_to_latecomers(size, rows - skips) for skips in skips_on_offer
    }
    alone_ms = {skips: ways[0, skips].ms * alone for skips in skips_on_offer}
    options = _unbeaten(
        Option(chunks=0, skips=skips, ms=alone_ms[skips], price=price)
        for skips, price in skips_on_offer.items()
    )
    for count in counts:
        for skips in skips_on_offer:
            ways[count, skips] = durations.beside(size, rows - skips, count, weight)
        # Where chunks seem to make a slot faster, that is noise of the measuring.
        beside_ms = {
            skips: max(ways[count, skips].ms * beside, ms) for skips, ms in alone_ms.items()
        }
        options += _unbeaten(
            Option(
                chunks=count,
                skips=skips,
                ms=beside_ms[skips],
                price=price + num_delayed * (beside_ms[skips] - alone_ms[skips]),
            )
            for skips, price in skips_on_offer.items()
        )
    return tuple(options), ways


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A slot in flight that more chunks may run beside.

    options: what it takes as it is, or with more chunks. vae_threads: by the chunks added.
    """

    slot: SlotInFlight
    options: tuple[Option, ...]
    vae_threads: dict[int, int]

    @property
    def base_ms(self) -> float:
        """What it takes as it is."""
        return self.options[0].ms


def in_flight(
    times: Times,
    slot: SlotInFlight,
    decodes: Sequence[Decode],
    *,
    chunk_ms: float,
    num_delayed: float,
    rule: WindowRule,
) -> InFlight | None:
    """What may still be granted beside a slot that was sent; None where nothing may.

    It is taken as just begun.
    """
    size, rows, durations = slot.key.size, slot.num_rows, times.durations
    if slot.kind is None or not rows or all(one.is_coming for one in decodes):
        return None
    if not durations.has_beside(size, slot.shape.threads_beside):
        return None
    weight = times.chunk_weight(size, chunk_ms)
    beside = times.drift.factor(BESIDE)
    totals = durations.chunk_counts(size) if rule.chunking else (decodes[0].remaining,)

    def timed(chunks: int) -> Timed:
        return durations.beside(size, rows, chunks, weight, shape=slot.shape)

    base_ms = timed(slot.chunks).ms * (beside if slot.chunks else times.drift.factor(ALONE))
    options, vae_threads = [Option(chunks=0, skips=0, ms=base_ms)], {}
    for total in totals:
        if total > slot.chunks and (rule.chunking or not slot.chunks):
            way = timed(total)
            vae_threads[total - slot.chunks] = way.kind.vae_threads
            extra_ms = max(way.ms * beside - base_ms, 0.0)
            options.append(
                Option(
                    chunks=total - slot.chunks,
                    skips=0,
                    ms=base_ms + extra_ms,
                    price=num_delayed * extra_ms,
                )
            )
    return InFlight(slot=slot, options=tuple(options), vae_threads=vae_threads)


def chunk_price(stages: Iterable[Sequence[Option]], num_delayed: float) -> float:
    """What a chunk costs at most, in ms times requests that wait for the UNet, wherever it goes.

    It is asked for those that a plan leaves undone, too. Were they charged the least, a plan would
    leave all that do not fit into the cheapest places, time after time, and decodes pile up.
    """
    most = 0.0
    for stage in stages:
        alone_ms = {option.skips: option.ms for option in stage if not option.chunks}
        for option in stage:
            if option.chunks and option.skips in alone_ms:
                most = max(most, (option.ms - alone_ms[option.skips]) / option.chunks)
    return most * num_delayed


def _skips_on_offer(
    times: Times, batch: Batch, candidates: Sequence[Skippable], num_waiting: float
) -> dict[int, float]:
    """As few skips as may be, all, and half way; with the price, less what their time is worth."""
    size, rows = batch.key.size, batch.rows
    least, most = min(batch.min_skips, len(candidates)), len(candidates)
    prices = tuple(accumulate((one.price for one in candidates), initial=0.0))
    offers = {}
    for skips in sorted({least, (least + most + 1) // 2, most}):
        saved_ms = times.alone_ms(size, rows) - times.alone_ms(size, rows - skips)
        mean_price = prices[skips] / skips if skips else 0.0
        offers[skips] = saved_ms * (mean_price - num_waiting)
    return offers


def _unbeaten(options: Iterable[Option]) -> list[Option]:
    """Of options with the same chunks those that no other beats in both time and price."""
    all_options = list(options)
    return [
        one
        for one in all_options
        if not any(other.ms < one.ms and other.price < one.price for other in all_options)
    ]
