"""Events that only the scheduler's own shell makes; the rest are messages."""

from __future__ import annotations

from dataclasses import dataclass

from shared.messages import GenerateImage, LatentsFinished, ToScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecovered:
    """An open request from before this epoch.

    attempt: what its record names, empty for none. latents: of that attempt, where an inline copy
    of them is left; of use only if no worker announces the request. resume_step: likewise, the
    step at which a drained worker has left its state; 0 for none.
    """

    request: GenerateImage
    attempt: str
    num_attempts: int
    latents: LatentsFinished | None = None
    resume_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRefused:
    """The store did not begin this attempt: its request is final, or another epoch in charge."""

    request_id: str
    attempt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""


Event = ToScheduler | RequestRecovered | AttemptRefused | Tick
