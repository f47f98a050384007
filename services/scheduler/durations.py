"""How long slots take on a device: a profile's answers, worked out once for each question.

Nothing here knows of drift: it multiplies what is asked for by the kind of slot, alone or beside.
"""

from __future__ import annotations

from statistics import fmean

from services.scheduler.profile import Profile, SlotKind

WEIGHT_STEPS = 16
"""Chunk weights are taken in sixteenths, so that few of them differ."""

Timed = tuple[SlotKind, float]
"""A slot kind and its duration in ms."""


class Durations:
    """Of one profile.

    Args:
        profile: It never changes; a worker that gets another one gets other durations.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._alone: dict[tuple[str, int], Timed] = {}
        self._beside: dict[tuple[str, int, int, float], Timed] = {}
        self._counts: dict[str, tuple[int, ...]] = {}
        self._chunk_ms: dict[str, float] = {}

    def alone(self, size: str, rows: int) -> Timed:
        """The fastest slot of so many rows with nothing beside it."""
        found = self._alone.get((size, rows))
        if found is None:
            profile = self._profile
            kinds = [kind for kind in profile.kinds(size) if not kind.chunks]
            timed = [(profile.slot_ms(size, rows, kind)[0], kind) for kind in kinds]
            ms, kind = min(timed)
            found = self._alone[(size, rows)] = (kind, ms)
        return found

    def beside(self, size: str, rows: int, chunks: int, weight: float) -> Timed:
        """The fastest slot of so many rows with chunks beside it, until both are over.

        weight: of a chunk, over one of the size's own. Only where `chunk_counts` has any.
        """
        weight = max(round(weight * WEIGHT_STEPS), 1) / WEIGHT_STEPS
        found = self._beside.get((size, rows, chunks, weight))
        if found is None:
            kinds = self._profile.beside_kinds(size)
            # Those measured with as many chunks, or the most below.
            known = max(
                (kind.chunks for kind in kinds if kind.chunks <= chunks),
                default=min(kind.chunks for kind in kinds),
            )
            timed = [
                (self._beside_ms(size, rows, kind, chunks * weight), kind)
                for kind in kinds
                if kind.chunks == known
            ]
            ms, kind = min(timed)
            found = self._beside[(size, rows, chunks, weight)] = (kind, ms)
        return found

    def chunk_counts(self, size: str) -> tuple[int, ...]:
        """Numbers of chunks that were measured beside slots of that size."""
        if size not in self._counts:
            kinds = self._profile.beside_kinds(size)
            self._counts[size] = tuple(sorted({kind.chunks for kind in kinds}))
        return self._counts[size]

    def chunk_ms(self, size: str) -> float:
        """The mean chunk of that size, alone; 0 where nothing is known."""
        if size not in self._chunk_ms:
            decode = self._profile.decode(size)
            self._chunk_ms[size] = fmean(decode.chunk_ms) if decode else 0.0
        return self._chunk_ms[size]

    def _beside_ms(self, size: str, rows: int, kind: SlotKind, chunks: float) -> float:
        """The longer side; more chunks than were measured slow the slot as those did."""
        step_ms, chunks_ms = self._profile.slot_ms(size, rows, kind)
        work = chunks / kind.chunks
        if work > 1:
            step_ms += (work - 1) * max(step_ms - self._alone_ms(size, rows, kind), 0.0)
        return max(step_ms, chunks_ms * work)

    def _alone_ms(self, size: str, rows: int, beside: SlotKind) -> float:
        """Of a slot alone on the threads of one beside chunks, where measured; or the fastest."""
        alone = SlotKind(unet_threads=beside.unet_threads)
        if alone in self._profile.kinds(size):
            return self._profile.slot_ms(size, rows, alone)[0]
        return self.alone(size, rows)[1]
