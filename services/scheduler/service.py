"""The scheduler's shell: gather events from Redis, ask the core, carry out its commands."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final, cast, get_args

from redis.asyncio import Redis

from services.scheduler.commands import (
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
from services.scheduler.configuration import load_profiles, policy_options
from services.scheduler.core import Core, CoreSettings
from services.scheduler.dead_letters import DeadLetters
from services.scheduler.events import AttemptRefused, Event, Tick
from services.scheduler.kept_profiles import KeptProfiles
from services.scheduler.policies import make_policy
from services.scheduler.profile import Profile
from services.scheduler.recovery import find_request
from services.scheduler.registrations import Registrations
from services.scheduler.status import describe, show_gauges
from services.scheduler.store_clock import StoreClock
from shared import codec, keys, metrics
from shared.errors import EpochEndedError, ProtocolError
from shared.logs import get_logger
from shared.messages import (
    DenoiseSlot,
    GenerateImage,
    ImageDecoded,
    RequestCancelled,
    RequestProgress,
    RequestsProgressed,
    ToScheduler,
    WorkerLost,
    WorkerRegistered,
)
from shared.patience import PatientRedis
from shared.probe import READINESS
from shared.records import FINAL_STATES, Records
from shared.settings import SchedulerSettings
from shared.streams import Buried, Entry, Streams, Writer, script

LEASE_MS = 2_000
HOUSEKEEPING_S = 0.5
PROGRESS_S = 0.1
PAUSE_GRACE_S = 10.0
"""Workers that a paused store kept from their heartbeats have so long to catch up."""

EXPECTED: Final = {
    keys.REQUESTS: "XLEN",
    keys.SCHEDULER: "XLEN",
    keys.EVENTS: "XLEN",
    keys.DEAD_LETTERS: "XLEN",
    keys.WORKERS: "SCARD",
    keys.PROFILES: "HLEN",
    keys.FINISHED: "ZCARD",
    keys.IMAGES: "ZCARD",
    keys.IMAGE_SIZES: "HLEN",
}
"""A command that each key takes, and changes nothing: one of another type is parked by it."""

KINDS: Final = {
    keys.REQUESTS: (GenerateImage,),
    keys.SCHEDULER: tuple(kind for kind in get_args(ToScheduler) if kind is not GenerateImage),
}
"""What belongs into the streams that the scheduler reads."""

log = get_logger()


class SchedulerService:
    """One scheduler process.

    Args:
        redis: The connection; the caller owns it.
        settings: As read at the start.
    """

    def __init__(self, redis: Redis, settings: SchedulerSettings) -> None:
        self._redis = redis
        self._settings = settings
        self._profiles = load_profiles(settings.profiles)
        self._token = uuid.uuid4().hex
        self._begin = script(redis, "begin_epoch")
        self._release_lease = script(redis, "release_lease")
        self._clock = StoreClock(redis)
        self._dead_letters = DeadLetters(redis)
        self._run_id = ""
        self._core: Core
        self._positions = {keys.SCHEDULER: "0", keys.REQUESTS: "0"}
        self._open_entries: dict[str, list[str]] = {}
        self._progress: dict[str, RequestProgress] = {}
        self._next_progress = 0.0
        self._is_stopping = asyncio.Event()

    def stop(self) -> None:
        """End `run` at the next opportunity."""
        self._is_stopping.set()

    async def run(self) -> None:
        """Wait for the lease, begin an epoch, and schedule until stopped.

        Raises:
            EpochEndedError: The epoch is over though nobody stopped it; start the process again.
        """
        epoch = await self._wait_for_epoch()
        if not epoch:
            return
        await self._begin_epoch(epoch)
        next_housekeeping = 0.0
        handled: list[str] = []
        while not self._is_stopping.is_set():
            handled += await self._read_and_handle()
            await self._report_progress()
            if time.monotonic() >= next_housekeeping:
                await self._housekeep()
                await self._streams.delete(keys.SCHEDULER, handled)
                handled = []
                next_housekeeping = time.monotonic() + HOUSEKEEPING_S
        await self._release_lease(keys=[keys.SCHEDULER_LEASE], args=[self._token])

    async def _read_and_handle(self) -> list[str]:
        """Handle what has come; the ids of the scheduler stream's entries that may be deleted."""
        reading = await self._streams.read_all(
            self._positions, count=256, block_ms=100, kinds=KINDS
        )
        for entry in reading.entries:
            self._positions[entry.stream] = entry.entry_id
        self._count_buried(reading.buried)
        closed = await self._find_closed(reading.entries)
        await self._handle([self._event(entry) for entry in reading.entries if entry not in closed])
        return [entry.entry_id for entry in reading.entries if entry.stream == keys.SCHEDULER]

    async def _find_closed(self, entries: Sequence[Entry]) -> list[Entry]:
        """Entries of requests that are final, or have no record: nobody would ever end them."""
        asked = [entry for entry in entries if entry.stream == keys.REQUESTS]
        if not asked:
            return []
        states = await self._records.states([_request_of(entry) for entry in asked])
        closed = [
            entry
            for entry, state in zip(asked, states, strict=True)
            if state is None or state in FINAL_STATES
        ]
        await self._streams.delete(keys.REQUESTS, [entry.entry_id for entry in closed])
        return closed

    def _event(self, entry: Entry) -> Event:
        """The message; a request's instant is the store's, whatever its gateway's clock says."""
        if not isinstance(entry.message, GenerateImage):
            return cast("Event", entry.message)
        request = entry.message
        self._open_entries.setdefault(request.request_id, []).append(entry.entry_id)
        return replace(request, submitted_at=self._clock.submitted_at(entry.entry_id))

    # --- start ----------------------------------------------------------------------------------

    async def _wait_for_epoch(self) -> int:
        """The number of the epoch that has begun with the lease; 0 if stopped before."""
        is_waiting = False
        while not self._is_stopping.is_set():
            self._run_id = await self._read_run_id()
            epoch = int(
                await self._begin(keys=[keys.SCHEDULER_LEASE], args=[self._token, LEASE_MS])
            )
            if epoch:
                return epoch
            if not is_waiting:
                log.info("another scheduler is in charge, waiting for its lease")
                is_waiting = True
            READINESS.renew(keys.STATUS_TTL_S)
            await asyncio.sleep(0.2)
        return 0

    async def _begin_epoch(self, epoch: int) -> None:
        retention = self._settings.retention
        self._writer = Writer(self._redis, epoch)
        self._streams = Streams(self._redis, epoch=epoch, record_ttl_s=retention.record_ttl_s)
        self._records = Records(self._redis, retention, epoch)
        self._registrations = Registrations(self._redis, self._writer)
        self._kept_profiles = KeptProfiles(self._redis, self._writer)
        await self._mend_keys([keys.DEAD_LETTERS])
        await self._dead_letters.begin()
        await self._mend_keys(EXPECTED)
        await self._clock.look()
        self._core = Core(
            epoch=epoch,
            policy=make_policy(self._settings.policy, policy_options(self._settings)),
            settings=CoreSettings(
                max_attempts=self._settings.max_attempts,
                recovery_s=self._settings.recovery_s,
                profiles=(*self._profiles, *await self._kept_profiles.read()),
            ),
            now=self._clock.now(),
        )
        metrics.EPOCH.set(epoch)
        num_open = await self._recover_requests()
        workers = await self._registrations.read()
        await self._handle([WorkerRegistered(worker=worker) for worker in workers])
        log.info("epoch begun", epoch=epoch, open_requests=num_open, workers=len(workers))

    async def _mend_keys(self, names: Iterable[str]) -> None:
        """Park what is not of the type that everybody expects."""
        await self._writer.write(*((EXPECTED[name], name) for name in names))

    async def _recover_requests(self) -> int:
        num_open = 0
        while True:
            reading = await self._streams.read_all(
                {keys.REQUESTS: self._positions[keys.REQUESTS]}, count=256, kinds=KINDS
            )
            self._count_buried(reading.buried)
            if not (reading.entries or reading.buried):
                return num_open
            for entry in reading.entries:
                self._positions[keys.REQUESTS] = entry.entry_id
                num_open += await self._recover(entry)

    async def _recover(self, entry: Entry) -> bool:
        """Whether the entry's request is open, which the core knows then."""
        request = cast("GenerateImage", self._event(entry))
        try:
            event = await find_request(self._redis, self._records, request)
        except ProtocolError as error:
            fields = {b"m": codec.encode(request), b"r": request.request_id.encode()}
            buried = await self._streams.bury(entry.stream, entry.entry_id, fields, str(error))
            self._count_buried([buried])
            return False
        if event is None:
            await self._streams.delete(keys.REQUESTS, [entry.entry_id])
            return False
        await self._handle([event])
        return True

    # --- events and commands --------------------------------------------------------------------

    async def _handle(self, events: Sequence[Event]) -> None:
        if not events:
            return
        for event in events:
            self._count_finished(event)
        refused = await self._execute(self._core.on_events(events, self._clock.now()))
        if refused:
            # Final, or gone: the core gives up what it holds of them.
            await self._execute(self._core.on_events(refused, self._clock.now()))

    async def _execute(self, commands: Sequence[Command]) -> list[AttemptRefused]:
        """Attempts are named before anything of theirs is sent; sends keep their order.

        Returns:
            The attempts that the store has refused; nothing of theirs was sent.
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

    async def _report_progress(self) -> None:
        """To all gateways, a few times a second: each slot would be more than anybody can watch."""
        if self._progress and time.monotonic() >= self._next_progress:
            # Those that are over by now have been told so.
            items = tuple(
                one for name, one in self._progress.items() if name in self._core.requests
            )
            self._progress.clear()
            self._next_progress = time.monotonic() + PROGRESS_S
            if items:
                await self._streams.notify(RequestsProgressed(items=items))

    async def _note(self, commands: Sequence[Command]) -> None:
        """What lasts: final states, lost workers, profiles."""
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
        """An event that the core could make nothing of; what it names fails by another command."""
        name = type(event).__name__
        stream = keys.REQUESTS if isinstance(event, GenerateImage) else keys.SCHEDULER
        payload = codec.encode(event) if isinstance(event, get_args(ToScheduler)) else name.encode()
        buried = await self._streams.bury(stream, "0-0", {b"m": payload}, f"{name}: {reason}")
        self._count_buried([buried])

    async def _keep(self, profile: Profile) -> None:
        key = profile.slots[0].key
        log.info(
            "profile completed",
            model=profile.model_id,
            knee=profile.knee(key),
            slots_beside_chunks=len(profile.beside_kinds(key)),
        )
        await self._kept_profiles.keep(profile)

    def _count_finished(self, event: Event) -> None:
        """Each of these comes once, from the call that made the request final."""
        match event:
            case ImageDecoded(request_id=request_id):
                metrics.REQUESTS_FINISHED.labels(state="done").inc()
                request = self._core.requests.get(request_id)
                if request:
                    seconds = self._clock.now() - request.request.submitted_at
                    metrics.REQUEST_SECONDS.observe(seconds)
            case RequestCancelled():
                metrics.REQUESTS_FINISHED.labels(state="cancelled").inc()
            case _:
                pass

    def _count_buried(self, buried: Iterable[Buried]) -> None:
        for entry in buried:
            if entry.has_failed:
                metrics.REQUESTS_FINISHED.labels(state="failed").inc()

    # --- housekeeping ---------------------------------------------------------------------------

    async def _housekeep(self) -> None:
        await self._renew_lease()
        await self._mend_keys(EXPECTED)
        await self._records.make_room()
        await self._clock.look()
        known = [*self._core.unets, *self._core.vaes]
        alive = {worker.incarnation for worker in await self._registrations.read()}
        if self._seconds_since_pause() < PAUSE_GRACE_S:
            alive.update(known)
        lost = [WorkerLost(incarnation=name) for name in known if name not in alive]
        await self._handle([*lost, Tick()])
        await self._drop_final_entries()
        await self._dead_letters.follow()
        show_gauges(self._core)
        status = describe(self._core, policy=self._settings.policy, now=self._clock.now())
        payload = codec.encode_value(status)
        await self._writer.write(("SET", keys.STATUS, payload, "EX", keys.STATUS_TTL_S))
        READINESS.renew(keys.STATUS_TTL_S)

    async def _drop_final_entries(self) -> None:
        """Entries of requests that the core has done with: duplicates, and what has no record."""
        over = [name for name in self._open_entries if name not in self._core.requests]
        entries = [entry for name in over for entry in self._open_entries.pop(name)]
        await self._streams.delete(keys.REQUESTS, entries)

    async def _renew_lease(self) -> None:
        """The epoch is what counts: while it is the newest, the lease is this scheduler's."""
        await self._writer.write(("SET", keys.SCHEDULER_LEASE, self._token, "PX", LEASE_MS))
        if await self._read_run_id() != self._run_id:
            raise EpochEndedError("Redis has restarted; what it lost is found by a new epoch")

    def _seconds_since_pause(self) -> float:
        patience = self._redis.patience if isinstance(self._redis, PatientRedis) else None
        return patience.seconds_since_pause() if patience else float("inf")

    async def _read_run_id(self) -> str:
        return str((await self._redis.info("server"))["run_id"])


def _request_of(entry: Entry) -> str:
    return cast("GenerateImage", entry.message).request_id


def _attempt_of(message: object) -> tuple[str, str]:
    """Whose message it is, where it is one request's."""
    return getattr(message, "request_id", ""), getattr(message, "attempt", "")
