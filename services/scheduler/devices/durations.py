"""How long slots take on a device: a profile's answers, worked out once for each question.

Nothing here knows of drift: it multiplies what is asked for by the kind of slot, alone or beside.

On a CPU a slot's rows are split over the cores, and while chunks run some of its parts wait. Those
have fewer rows, so that all parts are done together: that is a slot's *shape*.
"""

from __future__ import annotations

from math import ceil
from statistics import fmean
from typing import NamedTuple

from services.scheduler.devices.profile import Profile, SlotKind
from shared.messages import NO_ROOM, SlotShape

WEIGHT_STEPS = 16
"""Chunk weights are taken in sixteenths, so that few of them differ."""


class Timed(NamedTuple):
    """A slot's kind, its shape, and its duration in ms."""

    kind: SlotKind
    ms: float
    shape: SlotShape = NO_ROOM


class Durations:
    """Of one profile.

    Args:
        profile: It never changes; a worker that gets another one gets other durations.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._alone: dict[tuple[str, int], Timed] = {}
        self._open: dict[tuple[str, int], Timed] = {}
        self._beside: dict[tuple[str, int, int, float, SlotShape | None], Timed] = {}
        self._counts: dict[str, tuple[int, ...]] = {}
        self._chunk_ms: dict[str, float] = {}

    def alone(self, size: str, rows: int) -> Timed:
        """The fastest slot of so many rows with nothing beside it."""
        found = self._alone.get((size, rows))
        if found is None:
            profile = self._profile
            kinds = [kind for kind in profile.kinds(size) if not kind.chunks]
            ms, kind = min((profile.slot_ms(size, rows, kind)[0], kind) for kind in kinds)
            found = self._alone[(size, rows)] = Timed(kind, ms)
        return found

    def open_to_latecomers(self, size: str, rows: int) -> Timed:
        """The same, in parts all alike, with room for as few chunks as any should they come."""
        found = self._open.get((size, rows))
        if found is None:
            found = self.alone(size, rows)
            counts = self.chunk_counts(size)
            if counts:
                kind = self.beside(size, rows, counts[0], 1.0).kind
                shape = SlotShape(
                    threads_beside=kind.unet_threads,
                    waiting_share=self._num_waiting(kind) / max(self._profile.threads, 1),
                )
                found = found._replace(shape=shape)
            self._open[(size, rows)] = found
        return found

    def beside(
        self, size: str, rows: int, chunks: int, weight: float, *, shape: SlotShape | None = None
    ) -> Timed:
        """The fastest slot of so many rows with chunks beside it, until both are over.

        weight: of a chunk, over one of the size's own. shape: of a slot that was sent already; None
        leaves it open. Only where `has_beside`.
        """
        weight = max(round(weight * WEIGHT_STEPS), 1) / WEIGHT_STEPS
        question = (size, rows, chunks, weight, shape)
        found = self._beside.get(question)
        if found is None:
            kinds = [
                kind
                for kind in self._profile.beside_kinds(size)
                if shape is None or shape.threads_beside == kind.unet_threads
            ]
            # Those measured with as many chunks, or the most below.
            known = max(
                (kind.chunks for kind in kinds if kind.chunks <= chunks),
                default=min(kind.chunks for kind in kinds),
            )
            found = self._beside[question] = min(
                (
                    self._timed_beside(size, rows, kind, chunks * weight, shape)
                    for kind in kinds
                    if kind.chunks == known
                ),
                key=lambda one: (one.ms, one.kind),
            )
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

    def _num_waiting(self, kind: SlotKind) -> int:
        """Parts of a slot, one for each thread, that wait while the kind's chunks run."""
        if not kind.unet_threads:
            return 0
        return max(self._profile.threads - kind.unet_threads, 0)

    def _timed_beside(
        self, size: str, rows: int, kind: SlotKind, chunks: float, shape: SlotShape | None
    ) -> Timed:
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
        _, chunks_ms = self._profile.slot_ms(size, rows, longest)
        work_ms = chunks * chunks_ms / longest.chunks
        num_waiting = self._num_waiting(kind)
        if not num_waiting:
            ms = self._going_on_ms(size, rows, rows, longest, work_ms)
            return Timed(kind, max(ms, work_ms), SlotShape(threads_beside=kind.unet_threads))
        if shape:
            choice = [shape.waiting_rows(rows)]
        else:
            choice = list(range(rows * num_waiting // self._profile.threads + 1))
        ms, waiting_rows = min(
            (self._in_parts_ms(size, rows, waiting, longest, work_ms), waiting)
            for waiting in choice
        )
        chosen = SlotShape(threads_beside=kind.unet_threads, waiting_share=waiting_rows / rows)
        return Timed(kind, ms, shape or chosen)

    def _in_parts_ms(
        self, size: str, rows: int, waiting_rows: int, kind: SlotKind, work_ms: float
    ) -> float:
        """With so many of the rows in parts that wait for the chunks, or for the other parts."""
        threads, num_waiting = self._profile.threads, self._num_waiting(kind)
        going_on = rows - waiting_rows
        as_many_alone = ceil(going_on * threads / kind.unet_threads)
        going_on_ms = self._going_on_ms(size, going_on, as_many_alone, kind, work_ms)
        if not waiting_rows:
            return max(going_on_ms, work_ms)
        _, waiting_ms, _ = self.alone(size, ceil(waiting_rows * threads / num_waiting))
        return max(going_on_ms, min(work_ms, going_on_ms) + waiting_ms, work_ms)

    def _going_on_ms(
        self, size: str, rows: int, as_many_alone: int, kind: SlotKind, work_ms: float
    ) -> float:
        """Of rows that don't wait for chunks, on the kind's threads; as many as alone on all."""
        _, alone_ms, _ = self.alone(size, as_many_alone)
        beside_ms = max(self._profile.beside_ms(size, rows, kind), alone_ms)
        return alone_ms + min(work_ms, beside_ms) * (1 - alone_ms / beside_ms)
