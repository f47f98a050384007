"""How long slots take on a device: a profile's answers, worked out once for each question.

Nothing here knows of drift: it multiplies what is asked for by the kind of slot, alone or beside.

On a CPU a slot's rows are split over the cores, and while chunks run some of its parts wait. Those
have fewer rows, so that all parts are done together: that is a slot's *shape*.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil
from statistics import fmean
from typing import TYPE_CHECKING, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

from shared.messages import NO_ROOM, SlotShape

if TYPE_CHECKING:
    from services.scheduler.devices.profile import DecodeTiming, Profile, SlotKind

SCALE_STEPS = 16
"""Scales of chunks are taken in sixteenths, so that few of them differ."""

P = ParamSpec("P")
T = TypeVar("T")


class Timed(NamedTuple):
    """A way to run a slot: its kind, its duration in ms, and its shape."""

    kind: SlotKind
    ms: float
    shape: SlotShape = NO_ROOM


class _Remembered:
    """A question whose answers are worked out once: `functools.cache` for each object of its own.

    The cache takes the method's place in the object, so that asking costs a look-up and no call.
    """

    def __init__(self, question: Callable[..., object]) -> None:
        self._question = question
        self._name = ""
        self.__doc__ = question.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, asked: object, owner: type) -> Callable[..., object]:
        answers = cache(self._question.__get__(asked, owner))
        asked.__dict__[self._name] = answers
        return answers


def _remembered(
    question: Callable[Concatenate[Durations, P], T],
) -> Callable[Concatenate[Durations, P], T]:
    """Return the same question, which is worked out once for each of its arguments."""
    return cast("Callable[Concatenate[Durations, P], T]", _Remembered(question))


class Durations:
    """The answers of one profile, remembered: planning asks for few of them, and often.

    Args:
        profile: Its `durations` are these, for all workers that are planned by it.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    @_remembered
    def knee(self, size: str) -> int:
        """Return the profile's `knee`."""
        return self.profile.knee(size)

    @_remembered
    def kinds(self, size: str) -> tuple[SlotKind, ...]:
        """Return the profile's `kinds`."""
        return self.profile.kinds(size)

    @_remembered
    def alone_kind(self, size: str) -> SlotKind:
        """Return the profile's `alone_kind`."""
        return self.profile.alone_kind(size)

    @_remembered
    def decode(self, size: str) -> DecodeTiming | None:
        """Return the profile's `decode`."""
        return self.profile.decode(size)

    @_remembered
    def slot_ms(self, size: str, rows: int, kind: SlotKind) -> tuple[float, float]:
        """Return the profile's `slot_ms`."""
        return self.profile.slot_ms(size, rows, kind)

    @_remembered
    def beside_ms(self, size: str, rows: int, kind: SlotKind) -> float:
        """Return the profile's `beside_ms`."""
        return self.profile.beside_ms(size, rows, kind)

    @_remembered
    def alone(self, size: str, rows: int) -> Timed:
        """Return the fastest way to run so many rows with nothing beside them."""
        kinds = [kind for kind in self.kinds(size) if not kind.chunks]
        ms, kind = min((self.slot_ms(size, rows, kind)[0], kind) for kind in kinds)
        return Timed(kind, ms)

    @_remembered
    def alone_with_room(self, size: str, rows: int) -> Timed:
        """Return the same in even parts, with room for as few chunks as any, should they come."""
        alone = self.alone(size, rows)
        counts = self.chunk_counts(size)
        if not counts:
            return alone
        kind = self.beside(size, rows, counts[0], 1.0).kind
        shape = SlotShape(
            threads_beside=kind.unet_threads,
            waiting_share=self._num_waiting(kind) / max(self.profile.threads, 1),
        )
        return alone._replace(shape=shape)

    def beside(
        self, size: str, rows: int, chunks: int, scale: float, *, shape: SlotShape | None = None
    ) -> Timed:
        """Return the fastest way to run so many rows with chunks beside, until both are over.

        scale: of a chunk, over one of the size's own. shape: of a slot that was sent already; None
        leaves it open. Only where `has_beside`.
        """
        scale = max(round(scale * SCALE_STEPS), 1) / SCALE_STEPS
        return self._beside(size, rows, chunks, scale, shape)

    @_remembered
    def _beside(
        self, size: str, rows: int, chunks: int, scale: float, shape: SlotShape | None
    ) -> Timed:
        kinds = [
            kind
            for kind in self.beside_kinds(size)
            if shape is None or shape.threads_beside == kind.unet_threads
        ]
        # Those measured with as many chunks, or the most below.
        known = max(
            (kind.chunks for kind in kinds if kind.chunks <= chunks),
            default=min(kind.chunks for kind in kinds),
        )
        return min(
            (
                self._timed_beside(size, rows, kind, chunks * scale, shape)
                for kind in kinds
                if kind.chunks == known
            ),
            key=lambda timed: (timed.ms, timed.kind),
        )

    @_remembered
    def beside_kinds(self, size: str) -> tuple[SlotKind, ...]:
        """Return the profile's `beside_kinds`."""
        return self.profile.beside_kinds(size)

    @_remembered
    def has_beside(self, size: str, unet_threads: int) -> bool:
        """Return whether chunks were measured beside slots of that size on so many threads."""
        return any(kind.unet_threads == unet_threads for kind in self.beside_kinds(size))

    @_remembered
    def chunk_counts(self, size: str) -> tuple[int, ...]:
        """Return the numbers of chunks that were measured beside slots of that size."""
        return tuple(sorted({kind.chunks for kind in self.beside_kinds(size)}))

    @_remembered
    def chunk_ms(self, size: str) -> float:
        """Return the mean chunk of that size, alone; 0 where nothing is known."""
        decode = self.decode(size)
        return fmean(decode.chunk_ms) if decode else 0.0

    def _num_waiting(self, kind: SlotKind) -> int:
        """Return the parts of a slot, one for each thread, that wait while chunks run."""
        if not kind.unet_threads:
            return 0
        return max(self.profile.threads - kind.unet_threads, 0)

    def _timed_beside(
        self, size: str, rows: int, kind: SlotKind, chunks: float, shape: SlotShape | None
    ) -> Timed:
        """Return how long a slot takes by the surest rates on its threads: of the most chunks."""
        split = (kind.unet_threads, kind.vae_threads)
        longest = max(
            (
                other
                for other in self.beside_kinds(size)
                if (other.unet_threads, other.vae_threads) == split
            ),
            key=lambda other: other.chunks,
        )
        _, chunks_ms = self.slot_ms(size, rows, longest)
        work_ms = chunks * chunks_ms / longest.chunks
        num_waiting = self._num_waiting(kind)
        if not num_waiting:
            ms = self._going_on_ms(size, rows, rows, longest, work_ms)
            return Timed(kind, max(ms, work_ms), SlotShape(threads_beside=kind.unet_threads))
        if shape:
            choice = [shape.waiting_rows(rows)]
        else:
            choice = list(range(rows * num_waiting // self.profile.threads + 1))
        ms, waiting_rows = min(
            (self._in_parts_ms(size, rows, waiting, longest, work_ms), waiting)
            for waiting in choice
        )
        chosen = SlotShape(threads_beside=kind.unet_threads, waiting_share=waiting_rows / rows)
        return Timed(kind, ms, shape or chosen)

    def _in_parts_ms(
        self, size: str, rows: int, waiting_rows: int, kind: SlotKind, work_ms: float
    ) -> float:
        """Return the duration with so many rows in parts that wait for chunks or other parts."""
        threads, num_waiting = self.profile.threads, self._num_waiting(kind)
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
        """Return the duration of rows that don't wait, on the kind's threads.

        as_many_alone: how many rows take as long on all threads with nothing beside them.
        """
        _, alone_ms, _ = self.alone(size, as_many_alone)
        beside_ms = max(self.beside_ms(size, rows, kind), alone_ms)
        return alone_ms + min(work_ms, beside_ms) * (1 - alone_ms / beside_ms)
