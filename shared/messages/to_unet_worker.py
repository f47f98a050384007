"""What a UNet worker is told: by the scheduler, and by the commit that frees a slot of its pool."""

from __future__ import annotations

from dataclasses import dataclass

from shared.messages.parts import NO_ROOM, ImageParameters, SlotRow, SlotShape
from shared.messages.to_any_worker import ToAnyWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmitRequest:
    """Encode the prompt and draw the latents."""

    epoch: int
    request_id: str
    attempt: str
    parameters: ImageParameters
    """What the picture is made from."""
    resume_step: int = 0
    """Above 0, go on at this forward with what a drained worker has left (`keys.resume`); where
    that is gone, begin at the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseSlot:
    """One batched UNet forward."""

    epoch: int
    seq: int
    kind: str
    """"alone" or "beside" (decode chunks run next to it)."""
    threads: int
    """For the compute thread; 0 leaves the library's default."""
    rows: tuple[SlotRow, ...]
    """Who takes part, each request once."""
    shape: SlotShape = NO_ROOM
    """What the slot leaves to decode chunks beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureSlot:
    """Time forwards of dummy rows, one after another; at least one.

    Nothing else is asked of the worker meanwhile.
    """

    epoch: int
    number: int
    """Of the measurement, for the answer."""
    height: int
    """In pixels."""
    width: int
    """In pixels."""
    rows: int
    """In each forward."""
    threads: int
    """As in `DenoiseSlot`."""
    window_ms: float
    """How long forwards are begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """Forget a request: cancelled, failed or moved. An older attempt's release changes nothing."""

    epoch: int
    request_id: str
    attempt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseLatents:
    """The commit has made this pool slot free; sent by the commit itself."""

    slot: int
    """As in the `TensorHandle`."""
    generation: int
    """As in the `TensorHandle`."""


ToUnetWorker = (
    AdmitRequest | DenoiseSlot | MeasureSlot | ReleaseRequest | ReleaseLatents | ToAnyWorker
)
