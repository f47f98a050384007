"""What the scheduler knows of requests and workers, and the legal moves of a request.

These are records: everybody may read them, only `cluster` writes them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import NamedTuple

from services.scheduler.devices.drift import Drift
from services.scheduler.devices.durations import Durations
from services.scheduler.devices.profile import Profile, SlotKind, make_key
from services.scheduler.planning.threshold import Threshold
from services.scheduler.planning.turns import FairTurns
from shared.messages import (
    NO_ROOM,
    GenerateImage,
    LatentsFinished,
    SlotRow,
    SlotShape,
    WorkerInfo,
)


class Stage(Enum):
    """Where a request is. A request that is final is not in the scheduler any more."""

    RECOVERING = "recovering"
    """Open from an earlier epoch; a worker may still announce that it holds it."""
    WAITING = "waiting"
    """Queued here, at no worker."""
    ENCODING = "encoding"
    """Sent to a UNet worker; its prompt is not encoded yet."""
    DENOISING = "denoising"
    """Resident on a UNet worker; forwards may be scheduled."""
    LATENTS = "latents"
    """Denoised; its latents wait for a VAE worker."""
    DECODING = "decoding"
    """At a VAE worker."""


TRANSITIONS: dict[Stage, frozenset[Stage]] = {
    Stage.RECOVERING: frozenset({Stage.WAITING, Stage.DENOISING, Stage.LATENTS, Stage.DECODING}),
    Stage.WAITING: frozenset({Stage.ENCODING}),
    Stage.ENCODING: frozenset({Stage.DENOISING, Stage.WAITING}),
    Stage.DENOISING: frozenset({Stage.LATENTS, Stage.WAITING}),
    Stage.LATENTS: frozenset({Stage.DECODING, Stage.WAITING}),
    Stage.DECODING: frozenset({Stage.LATENTS, Stage.WAITING}),
}

AT_UNET = frozenset({Stage.ENCODING, Stage.DENOISING})
"""Stages in which a UNet worker holds something of the request."""


class BatchKey(NamedTuple):
    """What requests must share to share a forward; height and width in pixels."""

    model: str
    height: int
    width: int

    @property
    def size(self) -> str:
        """Return the profile's name of the picture size."""
        return make_key(self.height, self.width)


@dataclass(slots=True, kw_only=True)
class Request:
    """One open request."""

    request: GenerateImage
    stage: Stage
    batch_key: BatchKey = field(init=False)
    warnings: tuple[str, ...] = ()

    # The attempt.
    attempt: str = ""
    """The current token, empty before the first."""
    num_attempts: int = 0
    asked_at: float = 0.0
    """Since when a worker owes an answer about it."""

    # Denoising.
    unet: str = ""
    """The incarnation of the worker that holds it, or has denoised it."""
    num_forwards: int = 0
    is_guided: bool = True
    next_step: int = 0
    """The forward to schedule next, counting those in flight as done."""
    done_step: int = 0
    """The forward its worker is known to hold, or the next worker can go on with."""
    slots_in_flight: int = 0
    """Slots that carry a row of it and are not reported yet."""

    # Skipped guidance.
    skip_steps: int = 0
    """Steps in a row from done_step on that its worker allows to be skipped."""
    skip_error: float = 0.0
    """How far the guidance was off when last measured."""
    num_skipped: int = 0
    last_full: int = -1
    """Its last step with full guidance, counting those in flight; -1 where none is known."""

    # Decoding.
    latents: LatentsFinished | None = None
    latents_at: float = 0.0
    """When its latents were there."""
    vae: str = ""
    num_decodes: int = 0
    """Begun in this attempt."""
    granted_chunks: int = 0
    done_chunks: int = 0
    has_gap: bool = False
    """Whether its last grant has the device to itself, so that slots wait for it."""

    def __post_init__(self) -> None:
        """Name what it may share a forward with, once: it is asked for at every event."""
        parameters = self.request.parameters
        self.batch_key = BatchKey(parameters.model, parameters.height, parameters.width)

    @property
    def request_id(self) -> str:
        """Return the request's name."""
        return self.request.request_id

    @property
    def rows(self) -> int:
        """Return the rows of a full step: guided 2, unguided 1."""
        return 2 if self.is_guided else 1

    @property
    def has_forwards_left(self) -> bool:
        """Return whether there is a forward that no slot in flight covers."""
        return self.stage is Stage.DENOISING and self.next_step < self.num_forwards

    @property
    def has_latents_soon(self) -> bool:
        """Return whether its last forward is in a slot that was sent, or just over."""
        return self.stage is Stage.DENOISING and self.next_step >= self.num_forwards

    @property
    def awaits_latents(self) -> bool:
        """Return whether its last forward is over and its latents were not handed over."""
        return self.has_latents_soon and not self.slots_in_flight

    @property
    def has_chunks_running(self) -> bool:
        """Return whether chunks are granted that have not run yet."""
        return self.granted_chunks > self.done_chunks

    @property
    def expected_forwards(self) -> int:
        """Return how many forwards are ahead, by its parameters until its worker has told."""
        if self.stage is Stage.DENOISING:
            return self.num_forwards - self.done_step
        return max(1, self.request.parameters.num_inference_steps - self.done_step)

    @property
    def deadline_at(self) -> float:
        """Return when it should be done; infinity for whenever."""
        deadline_ms = self.request.deadline_ms
        return self.request.submitted_at + deadline_ms / 1000 if deadline_ms > 0 else inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a plan promised for its window: the slots planned and the last ones behind them."""

    theta: float
    """The threshold in force."""
    planned_ms: float
    """Of slots and gaps."""
    alone_ms: float
    """Of the same steps alone and unskipped."""
    is_feasible: bool
    """Whether any plan keeps planned_ms <= alone_ms / theta."""
    is_forced: bool
    """Whether an overdue decode was granted regardless."""


@dataclass(slots=True, kw_only=True)
class SlotInFlight:
    """A slot that was sent and not reported."""

    seq: int
    sent_at: float
    """Since when its report is owed."""
    rows: tuple[SlotRow, ...]
    key: BatchKey
    kind: SlotKind | None = None
    """The profile's; None where none is known."""
    shape: SlotShape = NO_ROOM
    """How it leaves room for chunks."""
    num_rows: int = 0
    """As planned, skipped ones left out."""
    chunks: int = 0
    """Granted beside it."""


@dataclass(slots=True, kw_only=True)
class Usage:
    """What a slot or a gap takes of the device's time."""

    seq: int
    """Of the slot, 0 for a gap."""
    ms: float
    """As planned, until it is known to be more."""
    alone_ms: float
    """Of the same steps alone and unskipped, 0 for a gap."""


@dataclass(slots=True, kw_only=True)
class Worker:
    """What is known of a worker of either kind."""

    info: WorkerInfo
    """What it said of itself."""
    is_draining: bool = False
    is_suspect: bool = False
    """Whether an answer is overdue: it gets nothing until it has announced what it holds."""
    answered_at: float = 0.0
    """When it last answered anything."""
    probed_at: float = 0.0
    """When it was last asked what it holds."""
    warm: set[BatchKey] = field(default_factory=set)
    """What it has run already, so that nothing of it is to be compiled."""

    @property
    def is_usable(self) -> bool:
        """Return whether it may be given anything new."""
        return not (self.is_draining or self.is_suspect)


@dataclass(slots=True, kw_only=True)
class UnetWorker(Worker):
    """A UNet worker."""

    profile: Profile
    threshold: Threshold
    drift: Drift = field(default_factory=Drift)
    slots: deque[SlotInFlight] = field(default_factory=deque)
    """In flight, oldest first."""
    turns: FairTurns[BatchKey] = field(default_factory=FairTurns)
    """Of the batch keys, by the time of their slots."""
    usage: deque[Usage] = field(default_factory=lambda: deque(maxlen=8))
    """Of the last slots and gaps, for the window behind."""
    outlook: Outlook | None = None
    num_slots: int = 0
    rests_since: float = 0.0
    """When its last slot was over, or its last gap."""
    takes_turns: bool = False
    """Whether its device computes for one process at a time: nothing runs beside a slot."""
    is_announced: bool = False

    def __post_init__(self) -> None:
        """Note what was run at the worker's start."""
        if model := self.info.model:
            self.warm.add(BatchKey(self.info.model_id, model.default_height, model.default_width))

    @property
    def durations(self) -> Durations:
        """Return the profile's, remembered."""
        return self.profile.durations


@dataclass(slots=True, kw_only=True)
class VaeWorker(Worker):
    """A VAE worker."""

    decodes: list[str] = field(default_factory=list)
    """The requests it decodes, oldest first."""
    chunk_counts: dict[BatchKey, int] = field(default_factory=dict)
    """Of sizes that it has told of."""

    def num_chunks(self, key: BatchKey) -> int:
        """Return the chunks of a decode of that size; of the default size until it has told."""
        return self.chunk_counts.get(key, self.info.num_chunks)

    def owes(self, request: Request) -> bool:
        """Return whether granted chunks of this decode have not run, or its image is to come."""
        granted = request.granted_chunks
        return granted > request.done_chunks or granted >= self.num_chunks(request.batch_key)
