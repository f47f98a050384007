"""How long slots take on a device: a profile's answers, worked out once for each question.

Nothing here knows of drift: it multiplies what is asked for by the kind of slot, alone or beside.
"""

from __future__ import annotations

from statistics import fmean

from services.scheduler.profile import Profile, SlotKind

WEIGHT_STEPS = 16
"""Chunk weights are taken in sixteenths, so that few of them differ."""

ROOM_FACTOR = 1.05
"""A slot alone may take so much longer on threads that leave room for chunks beside it."""

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
        self._beside: dict[tuple[str, int, int, float, int | None], Timed] = {}
        self._counts: dict[str, tuple[int, ...]] = {}
        self._chunk_ms: dict[str, float] = {}

    def alone(self, size: str, rows: int) -> Timed:
        """The fastest slot of so many rows with nothing beside it.

        Or one nearly as fast that leaves room for a decode that comes while it runs.
        """
        found = self._alone.get((size, rows))
        if found is None:
            profile = self._profile
            kinds = [kind for kind in profile.kinds(size) if not kind.chunks]
            timed = [(profile.slot_ms(size, rows, kind)[0], kind) for kind in kinds]
            least_ms, _ = min(timed)
            roomy = {kind.unet_threads for kind in profile.beside_kinds(size)}
            ms, kind = min(
                timed,
                key=lambda one: (
                    one[1].unet_threads not in roomy or one[0] > ROOM_FACTOR * least_ms,
                    one,
                ),
            )
            found = self._alone[(size, rows)] = (kind, ms)
        return found

    def beside(
        self, size: str, rows: int, chunks: int, weight: float, *, unet_threads: int | None = None
    ) -> Timed:
        """The fastest slot of so many rows with chunks beside it, until both are over.

        weight: of a chunk, over one of the size's own. unet_threads: of the slot; None leaves them
        open. Only where `has_beside`.
        """
        weight = max(round(weight * WEIGHT_STEPS), 1) / WEIGHT_STEPS
        question = (size, rows, chunks, weight, unet_threads)
        found = self._beside.get(question)
        if found is None:
            kinds = [
                kind
                for kind in self._profile.beside_kinds(size)
                if unet_threads in {None, kind.unet_threads}
            ]
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
            found = self._beside[question] = (kind, ms)
        return found

    def has_beside(self, size: str, unet_threads: int) -> bool:
        """Whether chunks were measured beside slots of that size on so many threads."""
        kinds = self._profile.beside_kinds(size)
        return any(kind.unet_threads == unet_threads for kind in kinds)

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
