"""What the core asks its shell to do, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.scheduler.events import Event
from services.scheduler.profile import Profile
from shared.messages import Message, RequestProgress

Lane = Literal["work", "control"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Append a message to a worker's work or control stream."""

    incarnation: str
    lane: Lane
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginAttempt:
    """Name the attempt that may commit, before its first message is sent."""

    request_id: str
    attempt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartRequest:
    """Note that a request waits for a new attempt, and what made that necessary."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FailRequest:
    """Make the request final as failed."""

    request_id: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportProgress:
    """Tell the gateways how far requests are."""

    items: tuple[RequestProgress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetWorker:
    """Delete a lost worker's registration and streams."""

    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepProfile:
    """A profile was measured while serving; the next scheduler is to have it."""

    profile: Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkEvent:
    """Put an event aside that the core can make nothing of, and count it.

    The request that it names, if any, fails by a `FailRequest` of its own.
    """

    event: Event
    reason: str


Command = (
    Send
    | BeginAttempt
    | RestartRequest
    | FailRequest
    | ReportProgress
    | ForgetWorker
    | KeepProfile
    | ParkEvent
)
