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
        self._beside: dict[tuple[str, int, int, float, int | None], Timed] = {}
        self._counts: dict[str, tuple[int, ...]] = {}
        self._chunk_ms: dict[str, float] = {}

    def alone(self, size: str, rows: int) -> Timed:
        """The fastest slot of so many rows with nothing beside it."""
        found = self._alone.get((size, rows))
        if found is None:
            profile = self._profile
            kinds = [kind for kind in profile.kinds(size) if not kind.chunks]
            ms, kind = min((profile.slot_ms(size, rows, kind)[0], kind) for kind in kinds)
            found = self._alone[(size, rows)] = (kind, ms)
        return found

    def beside(
        self, size: str, rows: int, chunks: int, weight: float, *, unet_threads: int | None = None
    ) -> Timed:
        """The fastest slot of so many rows with chunks beside it, until both are over.

        It gives way to them: as slow as with chunks all along while they run, as fast as alone
        otherwise. weight: of a chunk, over one of the size's own. unet_threads: of the slot while
        they run; None leaves them open. Only where `has_beside`.
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
            ms, kind = min(
                (self._beside_ms(size, rows, kind, chunks * weight), kind)
                for kind in kinds
                if kind.chunks == known
            )
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
        """By the rates of the kind on the same threads whose chunks overlap most: the surest."""
        split = (kind.unet_threads, kind.vae_threads)
        longest = max(
            (
                one
                for one in self._profile.beside_kinds(size)
                if (one.unet_threads, one.vae_threads) == split
            ),
            key=lambda one: one.chunks,
        )
        _, alone_ms = self.alone(size, rows)
        all_along_ms = max(self._profile.beside_ms(size, rows, longest), alone_ms)
        _, chunks_ms = self._profile.slot_ms(size, rows, longest)
        work_ms = chunks * chunks_ms / longest.chunks
        if work_ms >= all_along_ms:
            return work_ms
        return alone_ms + work_ms * (1 - alone_ms / all_along_ms)
