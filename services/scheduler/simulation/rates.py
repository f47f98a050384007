"""How long things take on a simulated device, from its profile.

While a slot and a chunk are in flight together each goes at the rate that the profile's beside
kinds give; alone, at its own. Where a profile knows nothing of a combination the two are taken to
share the device evenly: as many cores as there are among all threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from services.scheduler.devices.durations import Durations
from services.scheduler.devices.profile import DecodeTiming, SlotKind, interpolate
from shared.messages import DenoiseSlot

EVEN_SHARE = 2.0
"""How much slower each of two goes that share a device without cores to count."""

THREAD_EXPONENT = 0.85
"""A step on 1/n of the threads takes n to this power as long, where that was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Durations in ms, the other side idle and the other side always busy."""

    alone_ms: float
    beside_ms: float

    def longer_by(self, ms: float) -> Rates:
        """Return the rates with something more to do that the other side doesn't slow down."""
        return Rates(alone_ms=self.alone_ms + ms, beside_ms=self.beside_ms + ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRates:
    """Of a slot's parts that go on beside chunks, and of those that wait; None for no such."""

    going_on: Rates
    waiting: Rates | None = None


def slot_rates(
    durations: Durations, size: str, rows: int, *, slot: DenoiseSlot, vae_threads: int
) -> SlotRates:
    """Return the rates of a slot, whose rows are split if it has fewer threads beside chunks."""
    threads, left = slot.threads, slot.shape.threads_beside or slot.threads
    kind = _beside_kind(durations, left, vae_threads)

    def rates_of(alone_ms: float, rows_beside: int, threads_beside: int) -> Rates:
        """Return rates beside chunks as measured on the threads left, or sharing the cores."""
        if kind:
            beside_ms = durations.beside_ms(size, rows_beside, kind)
        else:
            beside_ms = _even_share(durations, threads_beside + vae_threads) * alone_ms
        return Rates(alone_ms=alone_ms, beside_ms=max(beside_ms, alone_ms))

    if left == threads or rows < threads:
        return SlotRates(going_on=rates_of(_alone_ms(durations, size, rows, threads), rows, left))

    def rates_of_parts(part_rows: int, part_threads: int) -> Rates:
        """Return the rates of parts, as fast as all threads are for as many rows on each."""
        as_many = ceil(part_rows * threads / part_threads)
        alone_ms = _alone_ms(durations, size, as_many, threads)
        return rates_of(alone_ms, ceil(part_rows * left / part_threads), threads)

    waiting_rows = slot.shape.waiting_rows(rows)
    return SlotRates(
        going_on=rates_of_parts(rows - waiting_rows, left),
        waiting=rates_of_parts(waiting_rows, threads - left) if waiting_rows else None,
    )


def chunk_rates(
    durations: Durations, size: str, index: int, *, unet_threads: int, vae_threads: int
) -> Rates:
    """Return the rates of one chunk of a decode."""
    timing = durations.decode(size)
    if timing is None:
        return Rates(alone_ms=1.0, beside_ms=EVEN_SHARE)
    at_best_ms = chunk_ms = timing.chunk_ms[min(index, len(timing.chunk_ms) - 1)]
    measured = _decode_by_threads(durations, size, vae_threads)
    if measured:
        chunk_ms = measured.chunk_ms[min(index, len(measured.chunk_ms) - 1)]
    elif vae_threads and timing.threads > vae_threads:
        chunk_ms *= (timing.threads / vae_threads) ** THREAD_EXPONENT
    kind = _beside_kind(durations, unet_threads, vae_threads)
    if kind is None:
        share = _even_share(durations, unet_threads + vae_threads)
        return Rates(alone_ms=chunk_ms, beside_ms=share * chunk_ms)
    _, chunks_ms = durations.slot_ms(size, durations.knee(size), kind)
    own = sum(timing.chunk_ms) / len(timing.chunk_ms)
    stretch = chunks_ms / kind.chunks / own
    return Rates(alone_ms=chunk_ms, beside_ms=max(at_best_ms * stretch, chunk_ms))


def _even_share(durations: Durations, threads: int) -> float:
    """Return how much slower so many threads go, or two sides that have no cores to share."""
    cores = durations.profile.threads
    return max(threads / cores, 1.0) if cores and threads else EVEN_SHARE


def _decode_by_threads(durations: Durations, size: str, threads: int) -> DecodeTiming | None:
    """Return a decode as measured alone with so many threads, if it was."""
    decodes = durations.profile.decodes
    found = (timing for timing in decodes if (timing.key, timing.threads) == (size, threads))
    return next(found, None)


def _alone_ms(durations: Durations, size: str, rows: int, threads: int) -> float:
    for timing in durations.profile.slots:
        is_it = timing.kind.chunks == 0 and timing.kind.unet_threads == threads
        if is_it and timing.key == size:
            return interpolate(timing.step_ms, rows)
    kind = durations.alone_kind(size)
    alone_ms, _ = durations.slot_ms(size, rows, kind)
    if threads and kind.unet_threads > threads:
        return alone_ms * float((kind.unet_threads / threads) ** THREAD_EXPONENT)
    return alone_ms


def _beside_kind(durations: Durations, unet_threads: int, vae_threads: int) -> SlotKind | None:
    """Return the kind of those threads whose chunks overlap most."""
    kinds = [
        timing.kind
        for timing in durations.profile.slots
        if timing.kind.chunks
        and (timing.kind.unet_threads, timing.kind.vae_threads) == (unet_threads, vae_threads)
    ]
    return max(kinds, key=lambda kind: kind.chunks, default=None)
