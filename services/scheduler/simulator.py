"""The scheduler's core against a profile instead of workers, event by event.

The core is the very one that serves; simulated workers keep the real ones' protocol, and a
simulated clock says when what they do is over. On a device a slot and a chunk slow each other as
the profile says (`simulated_device`).
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.scheduler.arrivals import Arrival
from services.scheduler.commands import FailRequest, Send
from services.scheduler.core import Core, CoreSettings
from services.scheduler.events import Event, Tick
from services.scheduler.policy import Policy
from services.scheduler.profile import Profile, make_key, num_pixels
from services.scheduler.simulated_device import (
    SKIP_PATTERNS,
    Rates,
    chunk_rates,
    slot_rates,
)
from services.scheduler.simulation_log import SimulationLog, ThetaSample
from shared import messages

MODEL_ID = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """The world around the core.

    message_ms: one way between scheduler and worker. commit_ms: from the last chunk to the final
    state. jitter: standard deviation of a duration's factor. max_s: simulated time to give up at.
    """

    num_groups: int = 1
    vaes_per_group: int = 1
    message_ms: float = 1.0
    commit_ms: float = 4.0
    jitter: float = 0.03
    max_s: float = 36_000.0
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class Job:
    """Work on a device. left: of it, from 1 to 0. version: of the completion that is scheduled."""

    rates: Rates
    on_done: Callable[[], None]
    left: float = 1.0
    elapsed_ms: float = 0.0
    version: int = 0


@dataclass(slots=True, kw_only=True)
class Resident:
    """A request at a simulated UNet worker."""

    arrival: Arrival
    attempt: str
    step: int = 0
    last_full: int = -1
    num_skipped: int = 0

    @property
    def skip_steps(self) -> int:
        """How many steps in a row may be skipped from the next one on."""
        pattern = SKIP_PATTERNS.get(self.arrival.guidance_skip)
        if pattern is None or self.arrival.guidance_scale <= 1 or self.last_full < 0:
            return 0
        allowed = pattern.steps_allowed(self.last_full, self.arrival.num_steps)
        return max(allowed - (self.step - self.last_full) + 1, 0)


@dataclass(slots=True, kw_only=True)
class Unet:
    """A simulated UNet worker. todo: admissions before slots."""

    info: messages.WorkerInfo
    slots: deque[messages.DenoiseSlot] = field(default_factory=deque)
    admissions: deque[messages.AdmitRequest] = field(default_factory=deque)
    held: dict[str, Resident] = field(default_factory=dict)
    job: Job | None = None
    running_seq: int = -1
    unet_threads: int = 0


@dataclass(slots=True, kw_only=True)
class SimulatedDecode:
    """A decode at a simulated VAE worker."""

    command: messages.DecodeLatents
    grants: deque[tuple[messages.GrantChunks, int]] = field(default_factory=deque)
    done: int = 0
    grant_ms: float = 0.0


@dataclass(slots=True, kw_only=True)
class Vae:
    """A simulated VAE worker."""

    info: messages.WorkerInfo
    decodes: dict[str, SimulatedDecode] = field(default_factory=dict)
    job: Job | None = None
    vae_threads: int = 0


@dataclass(slots=True, kw_only=True)
class Group:
    """One device: a UNet worker and the VAE workers beside it."""

    unet: Unet
    vaes: list[Vae]
    updated_at: float = 0.0


class Simulation:
    """One run.

    Args:
        profile: Of every device group.
        policy: What serves.
        arrivals: In the order of time.
        settings: The rest.
    """

    def __init__(
        self,
        profile: Profile,
        policy: Policy,
        arrivals: Sequence[Arrival],
        settings: SimulationSettings,
    ) -> None:
        self._profile = profile
        self._settings = settings
        self._chance = random.Random(settings.seed)
        self._now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._core = Core(
            epoch=1_000,
            policy=policy,
            settings=CoreSettings(max_attempts=5, recovery_s=0.0, profiles=(profile,)),
            now=0.0,
        )
        self._arrivals = {f"r{i:06d}": arrival for i, arrival in enumerate(arrivals)}
        self._groups: dict[str, Group] = {}
        self._vae_groups: dict[str, Group] = {}
        self.log = SimulationLog(num_requests=len(arrivals))

    def run(self) -> SimulationLog:
        """Everything from the first arrival to the last picture."""
        self._feed(Tick())
        for number in range(self._settings.num_groups):
            self._add_group(number)
        for request_id, arrival in self._arrivals.items():
            self._at(arrival.at_s, lambda r=request_id: self._arrive(r))  # type: ignore[misc]
        self._at(0.5, self._tick)
        while self._heap and self._now < self._settings.max_s:
            at, _, call = heapq.heappop(self._heap)
            self._now = max(self._now, at)
            call()
            if self.log.is_complete:
                break
        self.log.ended_at = self._now
        return self.log

    # --- time -----------------------------------------------------------------------------------

    def _at(self, at: float, call: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at, self._order, call))

    def _after(self, ms: float, call: Callable[[], None]) -> None:
        self._at(self._now + ms / 1000, call)

    def _tick(self) -> None:
        self._feed(Tick())
        if not self.log.is_complete:
            self._after(500, self._tick)

    def _tell(self, event: Event) -> None:
        self._after(self._settings.message_ms, lambda: self._feed(event))

    def _feed(self, event: Event) -> None:
        for command in self._core.on_event(event, self._now):
            if isinstance(command, Send):
                self._after(
                    self._settings.message_ms,
                    lambda c=command: self._receive(c.incarnation, c.message),  # type: ignore[misc]
                )
            elif isinstance(command, FailRequest):
                self.log.failed(command.request_id, command.code)

    # --- what comes in --------------------------------------------------------------------------

    def _add_group(self, number: int) -> None:
        group = f"g{number}"
        decode = self._profile.decode(self._profile.slots[0].key)
        num_chunks = len(decode.chunk_ms) if decode else 1
        infos = [_worker_info("unet", f"{group}-unet", group, self._profile, num_chunks)] + [
            _worker_info("vae", f"{group}-vae-{i}", group, self._profile, num_chunks)
            for i in range(self._settings.vaes_per_group)
        ]
        made = Group(unet=Unet(info=infos[0]), vaes=[Vae(info=info) for info in infos[1:]])
        self._groups[infos[0].incarnation] = made
        for info in infos[1:]:
            self._vae_groups[info.incarnation] = made
        for info in infos:
            self._feed(messages.WorkerRegistered(worker=info))

    def _arrive(self, request_id: str) -> None:
        arrival = self._arrivals[request_id]
        self.log.submitted(request_id, self._now)
        height, width = self._size(arrival)
        self._feed(
            messages.GenerateImage(
                request_id=request_id,
                job_id=request_id,
                owner=arrival.owner,
                priority=0,
                deadline_ms=arrival.deadline_ms,
                submitted_at=self._now,
                parameters=messages.ImageParameters(
                    prompt="",
                    negative_prompt="",
                    seed=0,
                    height=height,
                    width=width,
                    num_inference_steps=arrival.num_steps,
                    guidance_scale=arrival.guidance_scale,
                    sampler="ddim",
                    guidance_skip=arrival.guidance_skip,
                    output_format="png",
                    output_compression=100,
                    model=self._profile.model_id,
                ),
            )
        )

    def _size(self, arrival: Arrival) -> tuple[int, int]:
        if arrival.height and arrival.width:
            return arrival.height, arrival.width
        height, _, width = self._profile.slots[0].key.partition("x")
        return int(height), int(width)

    def _receive(self, incarnation: str, message: messages.Message) -> None:
        if incarnation in self._groups:
            self._unet_receives(self._groups[incarnation], message)
        elif incarnation in self._vae_groups:
            group = self._vae_groups[incarnation]
            vae = next(one for one in group.vaes if one.info.incarnation == incarnation)
            self._vae_receives(group, vae, message)

    def _unet_receives(self, group: Group, message: messages.Message) -> None:
        unet = group.unet
        match message:
            case messages.AdmitRequest():
                unet.admissions.append(message)
            case messages.DenoiseSlot():
                unet.slots.append(message)
            case messages.ReleaseRequest(request_id=request_id):
                unet.held.pop(request_id, None)
            case messages.BeginEpoch(epoch=epoch):
                self._tell(messages.WorkerAnnounced(incarnation=unet.info.incarnation, epoch=epoch))
        self._start(group)

    def _vae_receives(self, group: Group, vae: Vae, message: messages.Message) -> None:
        match message:
            case messages.DecodeLatents(request_id=request_id):
                vae.decodes[request_id] = SimulatedDecode(command=message)
            case messages.GrantChunks(request_id=request_id) if request_id in vae.decodes:
                vae.decodes[request_id].grants.append((message, message.chunks))
            case messages.CancelDecode(request_id=request_id):
                vae.decodes.pop(request_id, None)
        self._start(group)

    # --- work -----------------------------------------------------------------------------------

    def _start(self, group: Group) -> None:
        """Begin whatever can begin on a device, and say anew when what runs is over."""
        self._advance(group)
        if group.unet.job is None:
            self._start_unet(group)
        for vae in group.vaes:
            if vae.job is None:
                self._start_vae(group, vae)
        self._reschedule(group)

    def _advance(self, group: Group) -> None:
        """Bring the work in flight up to now, at the rates so far."""
        elapsed_ms = (self._now - group.updated_at) * 1000
        group.updated_at = self._now
        chunks = [vae.job for vae in group.vaes if vae.job]
        for job, is_beside in [
            *((job, bool(group.unet.job)) for job in chunks),
            *([(group.unet.job, bool(chunks))] if group.unet.job else []),
        ]:
            job.left -= elapsed_ms / _duration_ms(job, is_beside=is_beside)
            job.elapsed_ms += elapsed_ms

    def _reschedule(self, group: Group) -> None:
        chunks = [vae.job for vae in group.vaes if vae.job]
        jobs = [*chunks, *([group.unet.job] if group.unet.job else [])]
        for job in jobs:
            is_beside = bool(chunks) if job is group.unet.job else bool(group.unet.job)
            job.version += 1
            left_ms = max(job.left, 0.0) * _duration_ms(job, is_beside=is_beside)
            self._after(left_ms, lambda j=job, v=job.version: self._finish(group, j, v))  # type: ignore[misc]

    def _finish(self, group: Group, job: Job, version: int) -> None:
        if job.version != version:
            return
        self._advance(group)
        job.version += 1
        job.on_done()
        self._start(group)

    def _jitter(self, rates: Rates) -> Rates:
        factor = max(1 + self._chance.gauss(0, self._settings.jitter), 0.2)
        return Rates(alone_ms=rates.alone_ms * factor, beside_ms=rates.beside_ms * factor)

    def _start_unet(self, group: Group) -> None:
        unet = group.unet
        if unet.admissions:
            admit = unet.admissions.popleft()
            encode_ms = max(self._profile.encode_ms, 1e-3)
            rates = Rates(alone_ms=encode_ms, beside_ms=encode_ms)
            unet.job = Job(rates=rates, on_done=lambda: self._admitted(unet, admit))
            return
        if not unet.slots:
            return
        slot = unet.slots.popleft()
        unet.running_seq = slot.seq
        unet.unet_threads = slot.threads
        rows = [row for row in slot.rows if self._is_held(unet, row)]
        if not rows:
            self._slot_done(group, slot, [], 0.0)
            return
        num_rows = sum(self._rows(unet.held[row.request_id], row) for row in rows)
        size = make_key(*self._size(unet.held[rows[0].request_id].arrival))
        rates = slot_rates(
            self._profile,
            size,
            num_rows,
            unet_threads=slot.threads,
            vae_threads=group.vaes[0].vae_threads if group.vaes else 0,
        )
        self.log.slot(num_rows)
        job = Job(rates=self._jitter(rates), on_done=lambda: None)
        job.on_done = lambda: self._slot_done(group, slot, rows, job.elapsed_ms)
        unet.job = job

    def _admitted(self, unet: Unet, admit: messages.AdmitRequest) -> None:
        unet.job = None
        arrival = self._arrivals[admit.request_id]
        unet.held[admit.request_id] = Resident(arrival=arrival, attempt=admit.attempt)
        self._tell(
            messages.RequestAdmitted(
                incarnation=unet.info.incarnation,
                request_id=admit.request_id,
                attempt=admit.attempt,
                num_forwards=arrival.num_steps,
                is_guided=arrival.guidance_scale > 1,
            )
        )

    @staticmethod
    def _is_held(unet: Unet, row: messages.SlotRow) -> bool:
        held = unet.held.get(row.request_id)
        return held is not None and (held.attempt, held.step) == (row.attempt, row.step_index)

    @staticmethod
    def _rows(held: Resident, row: messages.SlotRow) -> int:
        skips = row.skip and held.skip_steps > 0
        return 1 if skips or held.arrival.guidance_scale <= 1 else 2

    def _slot_done(
        self,
        group: Group,
        slot: messages.DenoiseSlot,
        rows: Sequence[messages.SlotRow],
        duration_ms: float,
    ) -> None:
        unet = group.unet
        unet.job = None
        unet.running_seq = slot.seq + 1
        reports = []
        finished = []
        for row in slot.rows:
            held = unet.held.get(row.request_id)
            has_run = row in rows and held is not None
            was_skipped = False
            if held is not None and has_run:
                was_skipped = row.skip and held.skip_steps > 0
                held.num_skipped += was_skipped
                if not was_skipped:
                    held.last_full = held.step
                held.step += 1
                if held.step == held.arrival.num_steps:
                    finished.append(row)
                    del unet.held[row.request_id]
                    self.log.denoised(row.request_id, self._now, held.num_skipped, held.step)
                    held = None
            reports.append(
                messages.RowReport(
                    request_id=row.request_id,
                    attempt=row.attempt,
                    has_run=has_run,
                    next_step_index=held.step if held else -1,
                    was_skipped=was_skipped,
                    can_skip=bool(held and held.skip_steps),
                    skip_steps=held.skip_steps if held else 0,
                    skip_error=0.3 if held and held.last_full >= 0 else 0.0,
                )
            )
        self._tell(
            messages.SlotDenoised(
                incarnation=unet.info.incarnation,
                epoch=slot.epoch,
                seq=slot.seq,
                duration_ms=duration_ms,
                rows=tuple(reports),
            )
        )
        for row in finished:
            self._tell(_latents(unet, row))
        known = self._core.unets.get(unet.info.incarnation)
        if known:
            threshold = known.threshold
            self.log.thetas.append(
                ThetaSample(
                    at_s=self._now,
                    group=unet.info.device_group,
                    theta=threshold.value,
                    unet_stretch=threshold.stretches.unet,
                    vae_stretch=threshold.stretches.vae,
                )
            )

    def _start_vae(self, group: Group, vae: Vae) -> None:
        for decode in vae.decodes.values():
            if not decode.grants:
                continue
            grant, _ = decode.grants[0]
            if grant.beside_seq and group.unet.running_seq < grant.beside_seq:
                continue
            vae.vae_threads = grant.threads
            arrival = self._arrivals[decode.command.request_id]
            rates = chunk_rates(
                self._profile,
                make_key(*self._size(arrival)),
                decode.done,
                unet_threads=group.unet.unet_threads,
                vae_threads=grant.threads,
            )
            job = Job(rates=self._jitter(rates), on_done=lambda: None)
            job.on_done = lambda d=decode, j=job: self._chunk_done(vae, d, j)  # type: ignore[misc]
            vae.job = job
            return

    def _chunk_done(self, vae: Vae, decode: SimulatedDecode, job: Job) -> None:
        vae.job = None
        if decode.command.request_id not in vae.decodes:
            return
        decode.done += 1
        decode.grant_ms += job.elapsed_ms
        grant, left = decode.grants.popleft()
        if left > 1:
            decode.grants.appendleft((grant, left - 1))
        else:
            self._tell(
                messages.ChunksDecoded(
                    incarnation=vae.info.incarnation,
                    request_id=decode.command.request_id,
                    attempt=decode.command.attempt,
                    chunks_done=decode.done,
                    duration_ms=decode.grant_ms,
                )
            )
            decode.grant_ms = 0.0
        if decode.done >= vae.info.num_chunks:
            del vae.decodes[decode.command.request_id]
            self._after(self._settings.commit_ms, lambda: self._committed(vae, decode))

    def _committed(self, vae: Vae, decode: SimulatedDecode) -> None:
        command = decode.command
        self.log.finished(command.request_id, self._now)
        self._tell(
            messages.ImageDecoded(
                incarnation=vae.info.incarnation,
                request_id=command.request_id,
                attempt=command.attempt,
                decode_ms=0.0,
                transport="shm",
            )
        )


def _duration_ms(job: Job, *, is_beside: bool) -> float:
    return job.rates.beside_ms if is_beside else job.rates.alone_ms


def _latents(unet: Unet, row: messages.SlotRow) -> messages.LatentsFinished:
    handle = messages.TensorHandle(
        kind="shm",
        pool=unet.info.pool,
        owner=unet.info.incarnation,
        host="h",
        slot=0,
        generation=1,
        shape=(1,),
        dtype="float32",
    )
    return messages.LatentsFinished(
        incarnation=unet.info.incarnation,
        request_id=row.request_id,
        attempt=row.attempt,
        handle=handle,
    )


def _worker_info(
    kind: str, name: str, group: str, profile: Profile, num_chunks: int
) -> messages.WorkerInfo:
    key = profile.slots[0].key
    height, _, width = key.partition("x")
    decode = profile.decode(key)
    model = messages.ModelInfo(
        model_id=profile.model_id,
        latent_channels=4,
        vae_scale_factor=8,
        default_height=int(height),
        default_width=int(width),
        side_multiple=8,
        max_side=num_pixels(key),
        max_prompt_tokens=75,
        prediction_type="epsilon",
        samplers=("ddim",),
        default_sampler="ddim",
    )
    return messages.WorkerInfo(
        worker_id=name,
        incarnation=name,
        kind=kind,
        device_group=group,
        host="h",
        device=profile.device,
        dtype=profile.dtype,
        threads=profile.threads,
        max_requests=64 if kind == "unet" else 0,
        model_id=profile.model_id,
        model=model if kind == "unet" else None,
        step_ms=dict(profile.slots[0].step_ms) if kind == "unet" else {},
        decode_ms=sum(decode.chunk_ms) if decode else 0.0,
        num_chunks=num_chunks,
        pool="pool",
    )
