"""What a device can do with a model: how long each kind of slot and each decode chunk takes.

A profile is a value. It is measured ahead by `synerdiff profile` (real processes side by side), or
made in short from what workers say of themselves and then completed by `calibration`, or written
down as an assumption; `source` tells which. `profile_file` reads and writes it. What slots take
while serving goes to `drift`.

Words:
    key: "HEIGHTxWIDTH" in pixels of the picture.
    slot kind: CPU threads of the UNet and of the decoder, and decode chunks in flight beside it.
    A thread count of 0 is the library's default.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from services.scheduler.devices.durations import Durations
from shared.profile_files import ChunkGranularity

KNEE_FRACTION = 0.95
"""The knee is the smallest batch with at least this share of the best throughput."""


def make_key(height: int, width: int) -> str:
    """Return the profile's name of a picture size in pixels."""
    return f"{height}x{width}"


def num_pixels(key: str) -> int:
    """Return pixels of a picture of that key."""
    height, _, width = key.partition("x")
    return int(height) * int(width)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class SlotKind:
    """CPU threads of each side, 0 for the default, and chunks beside the slot, 0 for alone."""

    unet_threads: int
    vae_threads: int = 0
    chunks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotTiming:
    """One kind of slot at one picture size."""

    key: str
    kind: SlotKind
    step_ms: Mapping[int, float]
    """Median duration of the UNet forward by its rows."""
    chunks_ms: Mapping[int, float] = field(default_factory=dict)
    """Median time, by the same rows, that the kind's chunks took beside it; empty for a slot alone.
    Chunks that outlast their forward are measured with forwards going on."""
    spread: float = 0.0
    """(75th - 25th percentile) / median, the largest over the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiming:
    """A decode of one picture size, alone on the device."""

    key: str
    threads: int
    chunk_ms: tuple[float, ...]
    """Median duration of each chunk, in order."""
    granularity: str = ""
    """How it was cut, in words."""
    spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLevel:
    """What one level of `guidance_skip` costs and saves when all that it allows is skipped."""

    rows_saved: float
    """Of all rows of the fully guided run, 0 to 0.5."""
    psnr_mean_db: float
    """Against the pictures of full guidance."""
    psnr_p5_db: float


ASSUMED_SKIP_LEVELS: Mapping[str, SkipLevel] = {
    "balanced": SkipLevel(rows_saved=0.314, psnr_mean_db=39.2, psnr_p5_db=35.0),
    "fast": SkipLevel(rows_saved=0.38, psnr_mean_db=30.5, psnr_p5_db=22.4),
}
"""Where a profile has none: the embedded model's, by `synerdiff bench fidelity`."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """All timings of one model on one device, in milliseconds.

    Raises:
        ValueError: No slot alone is timed, or a duration is not positive.
    """

    model_id: str
    device: str
    """Either "cpu" or "cuda", as a worker's device begins."""
    dtype: str
    threads: int
    """CPU threads of the device, 0 where it has none to share."""
    slots: tuple[SlotTiming, ...]
    decodes: tuple[DecodeTiming, ...]
    encode_ms: float = 0.0
    """A guided request's text encoding, alone."""
    granularity: ChunkGranularity | None = None
    """How decodes were cut, and are to be; None leaves that to the workers."""
    skip_levels: Mapping[str, SkipLevel] = field(default_factory=lambda: dict(ASSUMED_SKIP_LEVELS))
    source: str = "measured"
    """Either "measured", "short" (what workers measured at their start: nothing is known of slots
    beside chunks, so none are offered, as if sharing the device gained nothing), "calibrated" (what
    they then measured side by side while serving) or "assumed"."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What it was measured on or taken from, by name."""

    def __post_init__(self) -> None:
        """Check what every later question relies on."""
        if not any(timing.kind.chunks == 0 for timing in self.slots):
            raise ValueError("a profile needs the duration of slots alone")
        for slot in self.slots:
            _check_positive(f"slot {slot.key} {slot.kind}", slot.step_ms.values())
            if slot.kind.chunks:
                _check_positive(f"chunks beside {slot.key} {slot.kind}", slot.chunks_ms.values())
                if set(slot.chunks_ms) != set(slot.step_ms):
                    raise ValueError(f"slot {slot.key} {slot.kind}: rows of the two sides differ")
        for decode in self.decodes:
            _check_positive(f"decode {decode.key}", decode.chunk_ms)

    @cached_property
    def durations(self) -> Durations:
        """Return its answers, remembered: the one cache that planning has."""
        return Durations(self)

    def knee(self, key: str) -> int:
        """Return the smallest batch that is nearly as fast per row, alone, as any measured."""
        durations, _ = self._timings(key, self.alone_kind(key))
        best = max(rows / ms for rows, ms in durations.items())
        return min(rows for rows, ms in durations.items() if rows / ms >= KNEE_FRACTION * best)

    def kinds(self, key: str) -> tuple[SlotKind, ...]:
        """Return the slot kinds on offer for a picture size.

        Those of threads by default are among them only if there is no other.
        """
        nearest = self._nearest(key, [timing.key for timing in self.slots])
        kinds = sorted({timing.kind for timing in self.slots if timing.key == nearest})
        return tuple(kind for kind in kinds if kind.unet_threads) or tuple(kinds)

    def alone_kind(self, key: str) -> SlotKind:
        """Return the fastest kind without chunks beside it, by the most rows of all kinds."""
        alone = [kind for kind in self.kinds(key) if kind.chunks == 0]
        rows = min(max(self._timings(key, kind)[0]) for kind in alone)
        return min(alone, key=lambda kind: self.slot_ms(key, rows, kind)[0])

    def beside_kinds(self, key: str) -> tuple[SlotKind, ...]:
        """Return the kinds with chunks beside the slot."""
        return tuple(kind for kind in self.kinds(key) if kind.chunks)

    def without_slots_beside(self) -> Profile:
        """Return the same of a device that computes for one process at a time."""
        alone = tuple(timing for timing in self.slots if not timing.kind.chunks)
        return replace(self, slots=alone)

    def slot_ms(self, key: str, rows: int, kind: SlotKind) -> tuple[float, float]:
        """Return durations of the forward and of the kind's chunks beside it (0 for none)."""
        step_ms, chunks_ms = self._timings(key, kind)
        return interpolate(step_ms, rows), interpolate(chunks_ms, rows) if chunks_ms else 0.0

    def beside_ms(self, key: str, rows: int, kind: SlotKind) -> float:
        """Return the duration of a slot that has the kind's chunks beside it all along.

        Chunks that were over before the slot was let its rest run as alone on the same threads.
        """
        step_ms, chunks_ms = self.slot_ms(key, rows, kind)
        alone = SlotKind(unet_threads=kind.unet_threads)
        alone_ms, _ = self.slot_ms(
            key, rows, alone if alone in self.kinds(key) else self.alone_kind(key)
        )
        if chunks_ms >= step_ms:
            return max(step_ms, alone_ms)
        done_beside = 1 - (step_ms - chunks_ms) / alone_ms
        return max(chunks_ms / done_beside if done_beside > 0 else step_ms, alone_ms)

    def decode(self, key: str) -> DecodeTiming | None:
        """Return the fastest decode alone of that size, scaled by pixels from the nearest one."""
        if not self.decodes:
            return None
        nearest = self._nearest(key, [timing.key for timing in self.decodes])
        same_key = [timing for timing in self.decodes if timing.key == nearest]
        named = [timing for timing in same_key if timing.threads] or same_key
        best = min(named, key=lambda timing: (sum(timing.chunk_ms), timing.threads))
        if nearest == key:
            return best
        scale = num_pixels(key) / num_pixels(nearest)
        return replace(best, key=key, chunk_ms=tuple(ms * scale for ms in best.chunk_ms))

    def _timings(self, key: str, kind: SlotKind) -> tuple[dict[int, float], dict[int, float]]:
        """Return the two sides' durations by rows; of an unmeasured size, scaled by its pixels."""
        nearest = self._nearest(key, [timing.key for timing in self.slots if timing.kind == kind])
        timing = next(t for t in self.slots if t.key == nearest and t.kind == kind)
        scale = 1.0 if nearest == key else num_pixels(key) / num_pixels(nearest)
        return (
            {rows: ms * scale for rows, ms in timing.step_ms.items()},
            {rows: ms * scale for rows, ms in timing.chunks_ms.items()},
        )

    @staticmethod
    def _nearest(key: str, keys: Sequence[str]) -> str:
        if not keys:
            raise KeyError(f"the profile has nothing of that kind for {key}")
        pixels = num_pixels(key)
        return min(keys, key=lambda known: (abs(num_pixels(known) - pixels), known))


def interpolate(durations: Mapping[int, float], rows: int) -> float:
    """Return the duration at `rows`: linear between measurements, and beyond the largest."""
    if rows in durations:
        return durations[rows]
    sizes = sorted(durations)
    if rows < sizes[0]:
        return durations[sizes[0]]
    if len(sizes) == 1:
        return durations[sizes[0]] * rows / sizes[0]
    upper = min(bisect_left(sizes, rows), len(sizes) - 1)
    low, high = sizes[upper - 1], sizes[upper]
    slope = (durations[high] - durations[low]) / (high - low)
    return max(durations[low] + slope * (rows - low), durations[sizes[0]])


def _check_positive(name: str, durations: object) -> None:
    values = list(durations)  # type: ignore[call-overload]
    if not values or any(ms <= 0 for ms in values):
        raise ValueError(f"{name} needs positive durations, got {values}")
