"""What the scheduler knows: requests, workers, and the legal moves of a request between stages.

All of the scheduler's domain state is here, and only `core` and what it is made of change it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import NamedTuple

from services.scheduler.drift import Drift
from services.scheduler.durations import Durations
from services.scheduler.profile import Profile, SlotKind, make_key
from services.scheduler.threshold import Threshold
from shared.errors import IllegalTransitionError
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
        """The profile's key."""
        return make_key(self.height, self.width)


@dataclass(slots=True, kw_only=True)
class Request:
    """One open request.

    attempt: the current token, empty before the first. next_step: the forward to schedule next,
    counting those in flight as done. done_step: the forward its worker is known to hold, or the one
    at which the next worker can go on with it.
    slots_in_flight: slots that carry a row of it and are not reported yet. skip_steps: steps in a
    row from done_step on that its worker allows to be skipped; skip_error: how far the guidance
    was off when last measured; num_skipped: so far; last_full: its last step with full guidance,
    counting those in flight, -1 where none is known. granted_chunks, done_chunks: of its decode;
    has_gap: its last grant has the device to itself, and slots wait for it. latents_at: when its
    latents were there. num_decodes: begun in this attempt. asked_at: since when a worker owes an
    answer about it.
    """

    request: GenerateImage
    stage: Stage
    batch_key: BatchKey = field(init=False)
    attempt: str = ""
    num_attempts: int = 0
    unet: str = ""
    num_forwards: int = 0
    is_guided: bool = True
    next_step: int = 0
    done_step: int = 0
    slots_in_flight: int = 0
    skip_steps: int = 0
    skip_error: float = 0.0
    num_skipped: int = 0
    last_full: int = -1
    latents: LatentsFinished | None = None
    latents_at: float = 0.0
    vae: str = ""
    num_decodes: int = 0
    asked_at: float = 0.0
    granted_chunks: int = 0
    done_chunks: int = 0
    has_gap: bool = False
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Name what it may share a forward with, once: it is asked for at every event."""
        parameters = self.request.parameters
        self.batch_key = BatchKey(parameters.model, parameters.height, parameters.width)

    @property
    def request_id(self) -> str:
        """The request's name."""
        return self.request.request_id

    @property
    def rows(self) -> int:
        """Rows of a full step: guided 2, unguided 1."""
        return 2 if self.is_guided else 1

    @property
    def has_forwards_left(self) -> bool:
        """Whether there is a forward that no slot in flight covers."""
        return self.stage is Stage.DENOISING and self.next_step < self.num_forwards

    @property
    def has_latents_soon(self) -> bool:
        """Whether its last forward is in a slot that was sent, or just over."""
        return self.stage is Stage.DENOISING and self.next_step >= self.num_forwards

    @property
    def awaits_latents(self) -> bool:
        """Whether its last forward is over and its worker has not handed its latents over."""
        return self.has_latents_soon and not self.slots_in_flight

    @property
    def expected_forwards(self) -> int:
        """How many forwards are ahead of it, by its parameters until its worker has told."""
        if self.stage is Stage.DENOISING:
            return self.num_forwards - self.done_step
        return max(1, self.request.parameters.num_inference_steps - self.done_step)

    @property
    def deadline_at(self) -> float:
        """When it should be done; infinity for whenever."""
        deadline_ms = self.request.deadline_ms
        return self.request.submitted_at + deadline_ms / 1000 if deadline_ms > 0 else inf

    def move_to(self, stage: Stage) -> None:
        """Change the stage.

        Raises:
            IllegalTransitionError: The table above forbids it.
        """
        if stage not in TRANSITIONS[self.stage]:
            raise IllegalTransitionError(
                f"request {self.request_id}: {self.stage.value} -> {stage.value}"
            )
        self.stage = stage

    def start_over(self) -> None:
        """Forget the attempt: nothing of it is anywhere."""
        self.move_to(Stage.WAITING)
        self.unet = self.vae = self.attempt = ""
        self.latents = None
        self.next_step = self.done_step = self.slots_in_flight = 0
        self.skip_steps = self.num_skipped = self.num_decodes = 0
        self.last_full = -1
        self.forget_decode()

    def hand_back(self, step_index: int) -> None:
        """Wait for another worker, which goes on with the same attempt at this step."""
        self.move_to(Stage.WAITING)
        self.unet = ""
        self.next_step = self.done_step = step_index
        self.slots_in_flight = self.skip_steps = 0
        self.last_full = -1

    def forget_decode(self) -> None:
        """No chunk of it is granted or done."""
        self.vae = ""
        self.granted_chunks = self.done_chunks = 0
        self.has_gap = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a plan promised. Times are of the window: slots planned and the last ones behind them.

    theta: the threshold in force. planned_ms: slots and gaps. alone_ms: the same steps alone and
    unskipped. is_feasible: whether any plan keeps planned_ms <= alone_ms / theta; is_forced: an
    overdue decode was granted regardless.
    """

    theta: float
    planned_ms: float
    alone_ms: float
    is_feasible: bool
    is_forced: bool


@dataclass(slots=True, kw_only=True)
class SlotInFlight:
    """A slot that was sent and not reported.

    kind: the profile's, None where none is known. shape: how it leaves room for chunks. num_rows:
    as planned, skipped ones left out. chunks: granted beside it. sent_at: since when it is owed.
    """

    seq: int
    sent_at: float
    rows: tuple[SlotRow, ...]
    key: BatchKey
    kind: SlotKind | None = None
    shape: SlotShape = NO_ROOM
    num_rows: int = 0
    chunks: int = 0


@dataclass(slots=True, kw_only=True)
class Spent:
    """What a slot or a gap takes of the device's time, as planned until it is known to be more.

    seq: of the slot, 0 for a gap. alone_ms: of the same steps alone and unskipped, 0 for a gap.
    """

    seq: int
    ms: float
    alone_ms: float


@dataclass(slots=True, kw_only=True)
class UnetWorker:
    """A UNet worker: what it said of itself, and what it has been sent.

    durations: of its profile. slots: in flight, oldest first. turns: when a batch key had its last
    slot, by slot number. ledger: of the last slots and gaps, for the window behind. rests_since:
    when its last slot was over, or its last gap. takes_turns: its device computes for one process
    at a time, so nothing runs beside a slot. answered_at: when it last answered anything. warm:
    what it has run slots of. is_suspect: an answer is overdue, so it gets nothing until it has
    announced what it holds; probed_at: when it was last asked to.
    """

    info: WorkerInfo
    profile: Profile
    durations: Durations = field(init=False)
    threshold: Threshold
    drift: Drift = field(default_factory=Drift)
    slots: deque[SlotInFlight] = field(default_factory=deque)
    turns: dict[BatchKey, int] = field(default_factory=dict)
    ledger: deque[Spent] = field(default_factory=lambda: deque(maxlen=8))
    outlook: Outlook | None = None
    num_slots: int = 0
    rests_since: float = 0.0
    takes_turns: bool = False
    is_draining: bool = False
    is_announced: bool = False
    answered_at: float = 0.0
    warm: set[BatchKey] = field(default_factory=set)
    is_suspect: bool = False
    probed_at: float = 0.0

    def __post_init__(self) -> None:
        """Begin with the profile's durations, and what was run at the worker's start."""
        self.use_profile(self.profile)
        if model := self.info.model:
            self.warm.add(BatchKey(self.info.model_id, model.default_height, model.default_width))

    @property
    def is_usable(self) -> bool:
        """Whether it may be given anything new."""
        return not (self.is_draining or self.is_suspect)

    def use_profile(self, profile: Profile) -> None:
        """Plan by another profile from now on."""
        self.profile = profile
        self.durations = Durations(profile)


@dataclass(slots=True, kw_only=True)
class VaeWorker:
    """A VAE worker and the requests it decodes, oldest first.

    chunk_counts: of sizes that it has told of. answered_at, warm, is_suspect, probed_at: as of a
    UNet worker.
    """

    info: WorkerInfo
    decodes: list[str] = field(default_factory=list)
    chunk_counts: dict[BatchKey, int] = field(default_factory=dict)
    is_draining: bool = False
    answered_at: float = 0.0
    warm: set[BatchKey] = field(default_factory=set)
    is_suspect: bool = False
    probed_at: float = 0.0

    @property
    def is_usable(self) -> bool:
        """Whether it may be given anything new."""
        return not (self.is_draining or self.is_suspect)

    def num_chunks(self, key: BatchKey) -> int:
        """Of a decode of that size; as of the default size until it has told."""
        return self.chunk_counts.get(key, self.info.num_chunks)

    def owes(self, request: Request) -> bool:
        """Whether chunks of this decode are granted that have not run, or its image is to come."""
        granted = request.granted_chunks
        return granted > request.done_chunks or granted >= self.num_chunks(request.batch_key)
