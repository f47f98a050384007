"""The scheduler's shell: gather events from Redis, ask the core, carry out its commands."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast, get_args

from redis.asyncio import Redis

from services.scheduler.commands import (
    BeginAttempt,
    Command,
    FailRequest,
    ForgetWorker,
    KeepProfile,
    ReportProgress,
    RestartRequest,
    Send,
)
from services.scheduler.configuration import load_profiles, policy_options
from services.scheduler.core import Core, CoreSettings
from services.scheduler.events import RequestRecovered, Tick
from services.scheduler.kept_profiles import KeptProfiles
from services.scheduler.policies import make_policy
from services.scheduler.profile import Profile
from shared import codec, keys, metrics
from shared.errors import SynerDiffError
from shared.host import Transport, choose_transport
from shared.logs import get_logger
from shared.messages import (
    DenoiseSlot,
    GenerateImage,
    ImageDecoded,
    LatentsFinished,
    Message,
    RequestProgress,
    RequestsProgressed,
    WorkerInfo,
    WorkerLost,
    WorkerRegistered,
)
from shared.probe import READINESS
from shared.records import Records
from shared.settings import SchedulerSettings
from shared.streams import Streams

LEASE_MS = 2_000
HOUSEKEEPING_S = 0.5
PROGRESS_S = 0.1

UNET_STAGES = ("waiting", "encoding", "denoising")
VAE_STAGES = ("latents", "decoding")

log = get_logger()


class EpochEndedError(SynerDiffError):
    """Another scheduler is in charge, or Redis came back as another; a fresh start follows."""

    code = "epoch_ended"


class SchedulerService:
    """One scheduler process.

    Args:
        redis: The connection; the caller owns it.
        settings: As read at the start.
    """

    def __init__(self, redis: Redis, settings: SchedulerSettings) -> None:
        self._redis = redis
        self._settings = settings
        self._streams = Streams(redis)
        self._records = Records(redis, settings.retention)
        self._profiles = load_profiles(settings.profiles)
        self._kept_profiles = KeptProfiles(redis)
        self._token = uuid.uuid4().hex
        self._run_id = ""
        self._core: Core
        self._positions = {keys.SCHEDULER: "0", keys.REQUESTS: "0"}
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
        if not await self._wait_for_lease():
            return
        self._run_id = await self._read_run_id()
        await self._begin_epoch()
        next_housekeeping = 0.0
        handled: list[str] = []
        while not self._is_stopping.is_set():
            entries = await self._streams.read(self._positions, count=256, block_ms=100)
            for entry in entries:
                self._positions[entry.stream] = entry.entry_id
            await self._handle([entry.message for entry in entries])
            handled += [entry.entry_id for entry in entries if entry.stream == keys.SCHEDULER]
            await self._report_progress()
            if time.monotonic() >= next_housekeeping:
                await self._streams.delete(keys.SCHEDULER, handled)
                handled = []
                await self._housekeep()
                next_housekeeping = time.monotonic() + HOUSEKEEPING_S
        await self._redis.delete(keys.SCHEDULER_LEASE)

    # --- start ----------------------------------------------------------------------------------

    async def _wait_for_lease(self) -> bool:
        is_waiting = False
        while not self._is_stopping.is_set():
            if await self._redis.set(keys.SCHEDULER_LEASE, self._token, nx=True, px=LEASE_MS):
                return True
            if not is_waiting:
                log.info("another scheduler is in charge, waiting for its lease")
                is_waiting = True
            READINESS.renew(keys.STATUS_TTL_S)
            await asyncio.sleep(0.2)
        return False

    async def _begin_epoch(self) -> None:
        stored = int(await self._redis.get(keys.EPOCH) or 0)
        epoch = max(stored + 1, int(time.time() * 1000))
        await self._redis.set(keys.EPOCH, epoch)
        # What workers said to an earlier scheduler is moot: they are asked what they hold.
        await self._redis.xtrim(keys.SCHEDULER, maxlen=0, approximate=False)
        self._core = Core(
            epoch=epoch,
            policy=make_policy(self._settings.policy, policy_options(self._settings)),
            settings=CoreSettings(
                max_attempts=self._settings.max_attempts,
                recovery_s=self._settings.recovery_s,
                profiles=(*self._profiles, *await self._kept_profiles.read()),
            ),
            now=time.time(),
        )
        metrics.EPOCH.set(epoch)
        num_open = await self._recover_requests()
        workers = await self._read_workers()
        await self._handle([WorkerRegistered(worker=worker) for worker in workers])
        log.info("epoch begun", epoch=epoch, open_requests=num_open, workers=len(workers))

    async def _recover_requests(self) -> int:
        num_open = 0
        while entries := await self._streams.read(
            {keys.REQUESTS: self._positions[keys.REQUESTS]}, count=256
        ):
            self._positions[keys.REQUESTS] = entries[-1].entry_id
            for entry in entries:
                if isinstance(entry.message, GenerateImage):
                    await self._recover(entry.message, entry.entry_id)
                    num_open += 1
        return num_open

    async def _recover(self, request: GenerateImage, entry_id: str) -> None:
        record = await self._records.read(request.request_id)
        if record is None or record.is_final:
            await self._streams.delete(keys.REQUESTS, [entry_id])
            return
        latents, resume_step = None, 0
        if record.attempt:
            place = (request.request_id, record.attempt)
            payload = await cast("Any", self._redis.hget(keys.latents(*place), "m"))
            message = codec.decode(payload) if payload else None
            latents = message if isinstance(message, LatentsFinished) else None
            step = await cast("Any", self._redis.hget(keys.resume(*place), "step"))
            resume_step = int(step or 0)
        event = RequestRecovered(
            request=request,
            attempt=record.attempt,
            num_attempts=record.num_attempts,
            latents=latents,
            resume_step=resume_step,
        )
        await self._execute(self._core.on_event(event, time.time()))

    async def _read_workers(self) -> list[WorkerInfo]:
        incarnations = [
            name.decode() for name in await cast("Any", self._redis.smembers(keys.WORKERS))
        ]
        if not incarnations:
            return []
        payloads = await self._redis.mget([keys.worker(name) for name in sorted(incarnations)])
        return [codec.decode_value(cast("bytes", p), WorkerInfo) for p in payloads if p]

    # --- events and commands --------------------------------------------------------------------

    async def _handle(self, events: Sequence[Message]) -> None:
        if not events:
            return
        for event in events:
            if isinstance(event, ImageDecoded):
                self._count_finished(event)
        await self._execute(self._core.on_events(cast("Any", events), time.time()))

    async def _execute(self, commands: Sequence[Command]) -> None:
        """Attempts are named before anything of theirs is sent; sends keep their order."""
        begun = [command for command in commands if isinstance(command, BeginAttempt)]
        await asyncio.gather(
            *(self._records.begin_attempt(item.request_id, item.attempt) for item in begun)
        )
        sends = []
        for command in commands:
            match command:
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
                case ForgetWorker(incarnation=incarnation):
                    await self._forget(incarnation)
                case KeepProfile(profile=profile):
                    await self._keep(profile)

    async def _forget(self, incarnation: str) -> None:
        log.warning("worker lost", incarnation=incarnation)
        await cast("Any", self._redis.srem(keys.WORKERS, incarnation))
        await self._redis.delete(
            keys.worker(incarnation), keys.work(incarnation), keys.control(incarnation)
        )

    async def _keep(self, profile: Profile) -> None:
        key = profile.slots[0].key
        log.info(
            "profile completed",
            model=profile.model_id,
            knee=profile.knee(key),
            slots_beside_chunks=len(profile.beside_kinds(key)),
        )
        await self._kept_profiles.keep(profile)

    def _count_finished(self, event: ImageDecoded) -> None:
        metrics.REQUESTS_FINISHED.labels(state="done").inc()
        request = self._core.requests.get(event.request_id)
        if request:
            metrics.REQUEST_SECONDS.observe(time.time() - request.request.submitted_at)

    # --- housekeeping ---------------------------------------------------------------------------

    async def _housekeep(self) -> None:
        await self._renew_lease()
        known = [*self._core.unets, *self._core.vaes]
        alive = {worker.incarnation for worker in await self._read_workers()}
        lost = [WorkerLost(incarnation=name) for name in known if name not in alive]
        now = time.time()
        await self._handle(lost)
        await self._execute(self._core.on_event(Tick(), now))
        stages = self._core.count_stages()
        self._show(stages)
        status = {
            "epoch": self._core.epoch,
            "policy": self._settings.policy,
            "stages": dict(stages),
            "queue": self._core.queue_order(now),
            "theta": {
                name: round(unet.threshold.value, 3) for name, unet in self._core.unets.items()
            },
            "profiles": {name: unet.profile.source for name, unet in self._core.unets.items()},
            "unet_workers": len(self._core.unets),
            "vae_workers": len(self._core.vaes),
        }
        await self._redis.set(keys.STATUS, codec.encode_value(status), ex=keys.STATUS_TTL_S)
        READINESS.renew(keys.STATUS_TTL_S)

    def _show(self, stages: Counter[str]) -> None:
        """The gauges."""
        unets, vaes = self._core.unets.values(), self._core.vaes.values()
        for stage in ("recovering", *UNET_STAGES, *VAE_STAGES):
            metrics.REQUESTS.labels(state=stage).set(stages[stage])
        metrics.BACKLOG.labels(pool="unet").set(sum(stages[stage] for stage in UNET_STAGES))
        metrics.BACKLOG.labels(pool="vae").set(sum(stages[stage] for stage in VAE_STAGES))
        metrics.WORKERS.labels(kind="unet").set(len(unets))
        metrics.WORKERS.labels(kind="vae").set(len(vaes))
        pairs = Counter(choose_transport(unet.info, vae.info) for unet in unets for vae in vaes)
        for transport in get_args(Transport):
            metrics.PAIRS.labels(transport=transport).set(pairs[transport])
        for unet in unets:
            group = unet.info.device_group
            metrics.THRESHOLD.labels(device_group=group).set(unet.threshold.value)
            is_complete = any(timing.kind.chunks for timing in unet.profile.slots)
            metrics.PROFILE_COMPLETE.labels(device_group=group).set(is_complete)

    async def _renew_lease(self) -> None:
        held = await self._redis.get(keys.SCHEDULER_LEASE)
        is_free = held is None
        if not is_free and held != self._token.encode():
            raise EpochEndedError("another scheduler has taken the lease")
        if not await self._redis.set(
            keys.SCHEDULER_LEASE, self._token, px=LEASE_MS, nx=is_free, xx=not is_free
        ):
            raise EpochEndedError("another scheduler has taken the lease")
        if await self._read_run_id() != self._run_id:
            raise EpochEndedError("Redis has restarted; what it lost is found by a new epoch")

    async def _read_run_id(self) -> str:
        return str((await self._redis.info("server"))["run_id"])
