"""What the scheduler knows: requests, workers, and the legal moves of a request between stages.

All of the scheduler's domain state is here, and only `core` changes it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from services.scheduler.profile import StepProfile
from shared.errors import IllegalTransitionError
from shared.messages import GenerateImage, LatentsFinished, SlotRow, WorkerInfo


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


@dataclass(slots=True, kw_only=True)
class Request:
    """One open request.

    attempt: the current token, empty before the first. next_step: the forward to schedule next,
    counting those in flight as done. done_step: the forward its worker is known to hold.
    slots_in_flight: slots that carry a row of it and are not reported yet. granted_chunks,
    done_chunks: of its decode.
    """

    request: GenerateImage
    stage: Stage
    attempt: str = ""
    num_attempts: int = 0
    unet: str = ""
    num_forwards: int = 0
    is_guided: bool = True
    next_step: int = 0
    done_step: int = 0
    slots_in_flight: int = 0
    can_skip: bool = False
    latents: LatentsFinished | None = None
    vae: str = ""
    granted_chunks: int = 0
    done_chunks: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def request_id(self) -> str:
        """The request's name."""
        return self.request.request_id

    @property
    def rows(self) -> int:
        """Rows of a full step: guided 2, unguided 1."""
        return 2 if self.is_guided else 1

    @property
    def batch_key(self) -> tuple[str, int, int]:
        """What requests must share to share a forward: model, height, width."""
        parameters = self.request.parameters
        return (parameters.model, parameters.height, parameters.width)

    @property
    def has_forwards_left(self) -> bool:
        """Whether there is a forward that no slot in flight covers."""
        return self.stage is Stage.DENOISING and self.next_step < self.num_forwards

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotInFlight:
    """A slot that was sent and not reported. kind: "alone" or "beside"."""

    seq: int
    kind: str
    rows: tuple[SlotRow, ...]


@dataclass(slots=True, kw_only=True)
class UnetWorker:
    """A UNet worker: what it said of itself, and what it has been sent.

    slots: in flight, oldest first. turns: when a batch key had its last slot, by slot number.
    """

    info: WorkerInfo
    profile: StepProfile
    slots: deque[SlotInFlight] = field(default_factory=deque)
    turns: dict[tuple[str, int, int], int] = field(default_factory=dict)
    num_slots: int = 0
    is_draining: bool = False
    is_announced: bool = False


@dataclass(slots=True, kw_only=True)
class VaeWorker:
    """A VAE worker and the requests it decodes, oldest first."""

    info: WorkerInfo
    decodes: list[str] = field(default_factory=list)
    is_draining: bool = False
