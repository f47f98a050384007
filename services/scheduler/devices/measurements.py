"""What is measured with two workers of one device, side by side, and the profile that comes of it.

A slot beside chunks is measured as two rates: forwards and decodes go on next to each other for a
while. From these follows a slot with any number of chunks beside it: as slow as measured while they
run, as fast as alone afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from services.scheduler.devices.choice import MADE_WITH, SHORT_SPREAD
from services.scheduler.devices.profile import (
    DecodeTiming,
    Profile,
    SlotKind,
    SlotTiming,
    interpolate,
)
from shared.messages import WorkerInfo

ALONE_ROWS = (1, 2, 4, 8, 16, 24)
BESIDE_ROWS = (2, 8, 16, 24)
BESIDE_CHUNKS = (1, 2, 4, 8)

MIN_WINDOW_MS = 250.0
REPEATS = 3
"""A window has room for so many forwards or decodes, whichever is longer, alone on its threads."""

MAX_TOTAL_MS = 10_000.0
"""Of all windows. The largest slots are left out where they would take longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What two workers run for a while, one of them or side by side."""

    rows: int = 0
    """Of the slots, 0 for decodes alone."""
    unet_threads: int = 0
    vae_threads: int = 0
    """0 for slots alone."""
    window_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came of it, in medians."""

    step_ms: float = 0.0
    """Of a forward, 0 for none."""
    chunk_ms: tuple[float, ...] = ()
    """Of each chunk of a decode."""


def thread_splits(threads: int) -> list[tuple[int, int]]:
    """Return (UNet, VAE) thread counts worth trying: one to half of the cores to decodes."""
    if threads <= 1:
        return [(1, 1)]
    shares = sorted({1, max(1, threads // 4), threads // 2})
    return [(threads - share, share) for share in shares]


def list_measurements(
    profile: Profile, unet: WorkerInfo, vae: WorkerInfo
) -> tuple[Measurement, ...]:
    """Return what there is to measure, of the profile's size; none if it takes too long.

    profile: in short. Threads are split on a CPU; any other device has none to split.
    """
    on_cpu = profile.device == "cpu"
    splits = thread_splits(unet.threads) if on_cpu else [(unet.threads, vae.threads)]
    beside_rows = BESIDE_ROWS if len(splits) == 1 else BESIDE_ROWS[::2]
    wanted = dict.fromkeys(
        [
            Measurement(vae_threads=vae.threads),
            *(Measurement(rows=rows, unet_threads=unet.threads) for rows in ALONE_ROWS),
            *(
                Measurement(rows=rows, unet_threads=unet_threads, vae_threads=vae_threads)
                for unet_threads, share in splits
                for rows in beside_rows
                for vae_threads in (0, min(share, vae.threads))
            ),
        ]
    )
    timed = [replace(wish, window_ms=_window_ms(wish, profile, unet, vae)) for wish in wanted]
    for most in reversed(beside_rows):
        listed = tuple(measurement for measurement in timed if measurement.rows <= most)
        if sum(measurement.window_ms for measurement in listed) <= MAX_TOTAL_MS:
            return listed
    return ()


def _window_ms(wish: Measurement, profile: Profile, unet: WorkerInfo, vae: WorkerInfo) -> float:
    """Return a window long enough on these threads, as if fewer took so much longer."""
    timing = profile.slots[0]
    longest = 0.0
    if wish.rows:
        step_ms, _ = profile.slot_ms(timing.key, wish.rows, timing.kind)
        longest = step_ms * unet.threads / wish.unet_threads
    decode = profile.decode(timing.key)
    if wish.vae_threads and decode:
        longest = max(longest, sum(decode.chunk_ms) * vae.threads / wish.vae_threads)
    return max(REPEATS * longest, MIN_WINDOW_MS)


def complete_profile(
    profile: Profile, found: Mapping[Measurement, Measured], *, made_with: str
) -> Profile | None:
    """Return the profile with what was found in it; None if no slot beside chunks was.

    A measurement that gave nothing is left out. made_with: the UNet worker's incarnation.
    """
    key = profile.slots[0].key
    alone: dict[int, dict[int, float]] = {}
    beside: dict[tuple[int, int], dict[int, Measured]] = {}
    decodes = []
    for measurement, measured in found.items():
        if not measurement.rows and measured.chunk_ms:
            decodes.append(_decode_timing(key, measurement.vae_threads, measured.chunk_ms))
        elif measurement.rows and not measurement.vae_threads and measured.step_ms:
            alone.setdefault(measurement.unet_threads, {})[measurement.rows] = measured.step_ms
        elif measured.step_ms and measured.chunk_ms:
            split = (measurement.unet_threads, measurement.vae_threads)
            beside.setdefault(split, {})[measurement.rows] = measured
    slots = [
        SlotTiming(
            key=key, kind=SlotKind(unet_threads=threads), step_ms=step_ms, spread=SHORT_SPREAD
        )
        for threads, step_ms in alone.items()
    ]
    for (unet_threads, vae_threads), rates in beside.items():
        if unet_threads in alone:
            slots += [
                _beside_timing(
                    key,
                    SlotKind(unet_threads=unet_threads, vae_threads=vae_threads, chunks=chunks),
                    alone[unet_threads],
                    rates,
                )
                for chunks in BESIDE_CHUNKS
            ]
    if not any(slot.kind.chunks for slot in slots):
        return None
    return replace(
        profile,
        slots=tuple(slots),
        decodes=tuple(decodes) or profile.decodes,
        source="calibrated",
        notes={"by": "its workers, side by side, while serving", MADE_WITH: made_with},
    )


def _decode_timing(key: str, threads: int, chunk_ms: Sequence[float]) -> DecodeTiming:
    return DecodeTiming(
        key=key,
        threads=threads,
        chunk_ms=tuple(chunk_ms),
        granularity=f"{len(chunk_ms)} chunks",
        spread=SHORT_SPREAD,
    )


def _beside_timing(
    key: str, kind: SlotKind, alone: Mapping[int, float], rates: Mapping[int, Measured]
) -> SlotTiming:
    """Return the timing of so many chunks, from both sides' rates next to each other."""
    step_ms, chunks_ms = {}, {}
    for rows, measured in rates.items():
        alone_ms = interpolate(alone, rows)
        beside_ms = max(measured.step_ms, alone_ms)  # company makes nobody faster
        chunks_ms[rows] = kind.chunks * sum(measured.chunk_ms) / len(measured.chunk_ms)
        share_beside = min(chunks_ms[rows] / beside_ms, 1.0)
        step_ms[rows] = share_beside * beside_ms + (1 - share_beside) * alone_ms
    return SlotTiming(key=key, kind=kind, step_ms=step_ms, chunks_ms=chunks_ms, spread=SHORT_SPREAD)
