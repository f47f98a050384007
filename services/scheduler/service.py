"""The scheduler's shell: gather events from Redis, ask the core, carry out its commands."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final, cast, get_args

from redis.asyncio import Redis

from services.scheduler.configuration import load_profiles, policy_options
from services.scheduler.core.core import Core, CoreSettings
from services.scheduler.core.events import Event, Tick
from services.scheduler.planning.policies import make_policy
from services.scheduler.planning.policy import Policy
from services.scheduler.shell.dead_letters import DeadLetters
from services.scheduler.shell.executor import Executor
from services.scheduler.shell.kept_profiles import KeptProfiles
from services.scheduler.shell.recovery import find_request
from services.scheduler.shell.registrations import Registrations
from services.scheduler.shell.status import describe, show_gauges
from services.scheduler.shell.store_clock import StoreClock
from shared import codec, metrics
from shared.errors import EpochEndedError, ProtocolError
from shared.logs import get_logger
from shared.messages import (
    GenerateImage,
    ImageDecoded,
    RequestCancelled,
    ToScheduler,
    WorkerLost,
    WorkerRegistered,
)
from shared.probe import READINESS
from shared.settings import SchedulerSettings
from shared.store import keys
from shared.store.patience import PatientRedis
from shared.store.records import FINAL_STATES, Records
from shared.store.streams import Entry, Streams, Writer, script

LEASE_MS = 2_000
HOUSEKEEPING_S = 0.5
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
        policy: Serves in place of the settings' own policy, under the name `policy_name`.
    """

    def __init__(
        self,
        redis: Redis,
        settings: SchedulerSettings,
        *,
        policy: Policy | None = None,
        policy_name: str = "",
    ) -> None:
        self._redis = redis
        self._settings = settings
        self._policy = policy or make_policy(settings.policy, policy_options(settings))
        self._policy_name = policy_name or settings.policy
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
            await self._executor.report_progress(self._core.requests)
            if time.monotonic() >= next_housekeeping:
                await self._housekeep()
                await self._streams.delete(keys.SCHEDULER, handled)
                handled = []
                next_housekeeping = time.monotonic() + HOUSEKEEPING_S
        await self._release_lease(keys=[keys.SCHEDULER_LEASE], args=[self._token])

    async def _read_and_handle(self) -> list[str]:
        """Handle what has come; return the ids of the scheduler stream's entries to delete."""
        reading = await self._streams.read_all(
            self._positions, count=256, block_ms=100, kinds=KINDS
        )
        for entry in reading.entries:
            self._positions[entry.stream] = entry.entry_id
        self._executor.count_buried(reading.buried)
        closed = await self._find_closed(reading.entries)
        await self._handle([self._event(entry) for entry in reading.entries if entry not in closed])
        return [entry.entry_id for entry in reading.entries if entry.stream == keys.SCHEDULER]

    async def _find_closed(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return entries of requests that are final, or have no record: nobody would end them."""
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
        """Return the message; a request's instant is the store's, whatever its gateway says."""
        if not isinstance(entry.message, GenerateImage):
            return cast("Event", entry.message)
        request = entry.message
        self._open_entries.setdefault(request.request_id, []).append(entry.entry_id)
        return replace(request, submitted_at=self._clock.submitted_at(entry.entry_id))

    # --- start ----------------------------------------------------------------------------------

    async def _wait_for_epoch(self) -> int:
        """Return the number of the epoch that has begun with the lease; 0 if stopped before."""
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
        kept_profiles = KeptProfiles(self._redis, self._writer)
        self._executor = Executor(
            streams=self._streams,
            records=self._records,
            registrations=self._registrations,
            kept_profiles=kept_profiles,
        )
        await self._mend_keys([keys.DEAD_LETTERS])
        await self._dead_letters.begin()
        await self._mend_keys(EXPECTED)
        await self._clock.look()
        self._core = Core(
            epoch=epoch,
            policy=self._policy,
            settings=CoreSettings(
                max_attempts=self._settings.max_attempts,
                recovery_s=self._settings.recovery_s,
                profiles=(*self._profiles, *await kept_profiles.read()),
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
            self._executor.count_buried(reading.buried)
            if not (reading.entries or reading.buried):
                return num_open
            for entry in reading.entries:
                self._positions[keys.REQUESTS] = entry.entry_id
                num_open += await self._recover(entry)

    async def _recover(self, entry: Entry) -> bool:
        """Return whether the entry's request is open, which the core knows then."""
        request = cast("GenerateImage", self._event(entry))
        try:
            event = await find_request(self._redis, self._records, request)
        except ProtocolError as error:
            fields = {b"m": codec.encode(request), b"r": request.request_id.encode()}
            buried = await self._streams.bury(entry.stream, entry.entry_id, fields, str(error))
            self._executor.count_buried([buried])
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
        refused = await self._executor.execute(self._core.on_events(events, self._clock.now()))
        if refused:
            # Final, or gone: the core gives up what it holds of them.
            await self._executor.execute(self._core.on_events(refused, self._clock.now()))

    def _count_finished(self, event: Event) -> None:
        """Count a final state; each of these comes once, from the call that made it final."""
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
        status = describe(self._core, policy=self._policy_name, now=self._clock.now())
        payload = codec.encode_value(status)
        await self._writer.write(("SET", keys.STATUS, payload, "EX", keys.STATUS_TTL_S))
        READINESS.renew(keys.STATUS_TTL_S)

    async def _drop_final_entries(self) -> None:
        """Delete entries of requests that the core has done with, duplicates included."""
        over = [name for name in self._open_entries if name not in self._core.requests]
        entries = [entry for name in over for entry in self._open_entries.pop(name)]
        await self._streams.delete(keys.REQUESTS, entries)

    async def _renew_lease(self) -> None:
        """Renew the lease, which is this scheduler's while its epoch is the newest."""
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
