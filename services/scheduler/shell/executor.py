"""Carries out what the core asks for: messages to workers, records, parked events, progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container, Iterable, Sequence
from typing import get_args

from services.scheduler.core.commands import (
    BeginAttempt,
    Command,
    FailRequest,
    ForgetWorker,
    KeepProfile,
    ParkEvent,
    ReportProgress,
    RestartRequest,
    Send,
)
from services.scheduler.core.events import AttemptRefused, Event
from services.scheduler.devices.profile import Profile
from services.scheduler.shell.kept_profiles import KeptProfiles
from services.scheduler.shell.registrations import Registrations
from shared import codec, metrics
from shared.logs import get_logger
from shared.messages import (
    DenoiseSlot,
    GenerateImage,
    RequestProgress,
    RequestsProgressed,
    ToScheduler,
)
from shared.store import keys
from shared.store.records import Records
from shared.store.streams import Buried, Streams

PROGRESS_S = 0.1
"""Between two reports of progress: each slot would be more than anybody can watch."""

log = get_logger()


class Executor:
    """One epoch's.

    Args:
        streams: To workers, gateways and the dead letters.
        records: The requests'.
        registrations: The workers'.
        kept_profiles: For the next scheduler.
    """

    def __init__(
        self,
        *,
        streams: Streams,
        records: Records,
        registrations: Registrations,
        kept_profiles: KeptProfiles,
    ) -> None:
        self._streams = streams
        self._records = records
        self._registrations = registrations
        self._kept_profiles = kept_profiles
        self._progress: dict[str, RequestProgress] = {}
        self._next_progress = 0.0

    async def execute(self, commands: Sequence[Command]) -> list[AttemptRefused]:
        """Return the attempts that the store has refused; nothing of theirs was sent.

        Attempts are named before anything of theirs is sent; sends keep their order.
        """
        begun = [command for command in commands if isinstance(command, BeginAttempt)]
        answers = await asyncio.gather(
            *(self._records.begin_attempt(item.request_id, item.attempt) for item in begun)
        )
        refused = {
            (item.request_id, item.attempt)
            for item, is_begun in zip(begun, answers, strict=True)
            if not is_begun
        }
        sends = []
        for command in commands:
            match command:
                case Send(message=message) if _attempt_of(message) in refused:
                    pass
                case Send(incarnation=incarnation, lane=lane, message=message):
                    stream = keys.work if lane == "work" else keys.control
                    sends.append((stream(incarnation), message))
                    if isinstance(message, DenoiseSlot):
                        metrics.SLOTS.labels(kind=message.kind).inc()
                case RestartRequest(request_id=request_id, reason=reason):
                    metrics.REDELIVERIES.labels(reason=reason).inc()
                    log.warning("request starts again", request_id=request_id, reason=reason)
                case ReportProgress(items=items):
                    self._progress.update({item.request_id: item for item in items})
        await self._streams.send_to_workers(sends)
        await self._note(commands)
        return [AttemptRefused(request_id=name, attempt=attempt) for name, attempt in refused]

    async def report_progress(self, open_requests: Container[str]) -> None:
        """Tell all gateways, a few times a second, how far requests are."""
        if self._progress and time.monotonic() >= self._next_progress:
            # Those that are over by now have been told so.
            items = tuple(item for name, item in self._progress.items() if name in open_requests)
            self._progress.clear()
            self._next_progress = time.monotonic() + PROGRESS_S
            if items:
                await self._streams.notify(RequestsProgressed(items=items))

    def count_buried(self, buried: Iterable[Buried]) -> None:
        """Count the requests that have failed with an entry that was parked."""
        for entry in buried:
            if entry.has_failed:
                metrics.REQUESTS_FINISHED.labels(state="failed").inc()

    async def _note(self, commands: Sequence[Command]) -> None:
        """Write what lasts: final states, lost workers, profiles."""
        for command in commands:
            match command:
                case FailRequest(request_id=request_id, code=code, reason=reason):
                    log.warning("request failed", request_id=request_id, code=code, reason=reason)
                    if await self._records.fail(request_id, code=code, reason=reason):
                        metrics.REQUESTS_FINISHED.labels(state="failed").inc()
                case ParkEvent(event=event, reason=reason):
                    await self._park(event, reason)
                case ForgetWorker(incarnation=incarnation):
                    log.warning("worker lost", incarnation=incarnation)
                    await self._registrations.forget(incarnation)
                case KeepProfile(profile=profile):
                    await self._keep(profile)

    async def _park(self, event: Event, reason: str) -> None:
        """Bury an event that the core could make nothing of.

        The request that it names fails by a command of its own.
        """
        name = type(event).__name__
        stream = keys.REQUESTS if isinstance(event, GenerateImage) else keys.SCHEDULER
        payload = codec.encode(event) if isinstance(event, get_args(ToScheduler)) else name.encode()
        buried = await self._streams.bury(stream, "0-0", {b"m": payload}, f"{name}: {reason}")
        self.count_buried([buried])

    async def _keep(self, profile: Profile) -> None:
        key = profile.slots[0].key
        log.info(
            "profile completed",
            model=profile.model_id,
            knee=profile.knee(key),
            slots_beside_chunks=len(profile.beside_kinds(key)),
        )
        await self._kept_profiles.keep(profile)


def _attempt_of(message: object) -> tuple[str, str]:
    """Return whose message it is, where it is one request's."""
    return getattr(message, "request_id", ""), getattr(message, "attempt", "")
