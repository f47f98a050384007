"""A world for the scheduler's core: fake workers, records and a mail box, without clock or Redis.

The fake workers keep the real ones' rule: a row runs only if its step is the one held for its
attempt. Everything that happens is a method, so that a test can choose the order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from services.scheduler.commands import (
    BeginAttempt,
    Command,
    FailRequest,
    ForgetWorker,
    ParkEvent,
    Send,
)
from services.scheduler.core import Core, CoreSettings
from services.scheduler.events import AttemptRefused, Event, RequestRecovered, Tick
from services.scheduler.liveness import Patience
from services.scheduler.policies import PolicyOptions, make_policy
from services.scheduler.policy import GroupView, Plan, Policy
from services.scheduler.profile import Profile
from services.scheduler.threshold import Threshold
from shared import messages

MODEL = messages.ModelInfo(
    model_id="m",
    latent_channels=4,
    vae_scale_factor=8,
    default_height=64,
    default_width=64,
    side_multiple=8,
    max_side=512,
    max_prompt_tokens=10,
    prediction_type="epsilon",
    samplers=("ddim",),
    default_sampler="ddim",
)


def make_request(
    request_id: str,
    *,
    steps: int = 3,
    guidance_scale: float = 5.0,
    side: int = 64,
    priority: int = 0,
    submitted_at: float = 0.0,
    guidance_skip: str = "off",
    deadline_ms: int = 0,
    owner: str = "",
    sampler: str = "ddim",
    model: str = "m",
) -> messages.GenerateImage:
    parameters = messages.ImageParameters(
        prompt=request_id,
        negative_prompt="",
        seed=1,
        height=side,
        width=side,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        guidance_skip=guidance_skip,
        output_format="png",
        output_compression=100,
        model=model,
    )
    return messages.GenerateImage(
        request_id=request_id,
        job_id=request_id,
        owner=owner,
        priority=priority,
        deadline_ms=deadline_ms,
        submitted_at=submitted_at,
        parameters=parameters,
    )


def warnings_of(request_id: str) -> tuple[str, ...]:
    """What a worker warns of at a request's admission."""
    return (f"the prompt of {request_id} was cut",)


def make_worker(
    kind: str, worker_id: str, incarnation: str, *, group: str = "g", model: str = "m"
) -> messages.WorkerInfo:
    return messages.WorkerInfo(
        worker_id=worker_id,
        incarnation=incarnation,
        kind=kind,
        device_group=group,
        host="h",
        device="cpu",
        dtype="float32",
        threads=2,
        max_requests=16,
        model_id=model,
        model=replace(MODEL, model_id=model) if kind == "unet" else None,
        step_ms={1: 10.0, 2: 12.0, 4: 20.0, 8: 40.0} if kind == "unet" else {},
        decode_ms=20.0,
        num_chunks=4,
    )


POISON = "poison"
"""A prompt that makes a `TouchyPolicy` raise whenever it has to plan for it."""


@dataclass(frozen=True)
class TouchyPolicy:
    """Another policy, with a fault."""

    policy: Policy

    @property
    def admission_factor(self) -> int:
        return self.policy.admission_factor

    @property
    def plans_overlap(self) -> bool:
        return self.policy.plans_overlap

    def first_threshold(self) -> Threshold:
        return self.policy.first_threshold()

    def adjust(self, view: GroupView) -> Threshold:
        return self.policy.adjust(view)

    def plan(self, view: GroupView) -> Plan:
        members = [*view.requests, *(decode.request for decode in view.decodes)]
        if any(one.request.parameters.prompt.startswith(POISON) for one in members):
            raise ArithmeticError("poison")
        return self.policy.plan(view)


@dataclass
class FakeUnet:
    """A request with a sampler that is not "ddim" can't move from here once it has begun."""

    info: messages.WorkerInfo
    is_draining: bool = False
    may_leave: bool = False
    unmovable: set[str] = field(default_factory=set)
    held: dict[str, tuple[str, int, int, bool]] = field(default_factory=dict)
    slots: deque[messages.DenoiseSlot] = field(default_factory=deque)
    finished: dict[int, messages.LatentsFinished] = field(default_factory=dict)
    skipped: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    last_full: dict[tuple[str, str], int] = field(default_factory=dict)
    epoch: int = 0
    unread: deque[messages.Message] = field(default_factory=deque)
    hangs: bool = False


@dataclass
class FakeDecode:
    command: messages.DecodeLatents
    granted: int = 0
    done: int = 0

    @property
    def num_chunks(self) -> int:
        """Small pictures are cut into fewer, large ones into more than workers say in general."""
        return {32: 3, 64: 4}.get(self.command.parameters.width, 6)


@dataclass
class FakeVae:
    info: messages.WorkerInfo
    is_draining: bool = False
    may_leave: bool = False
    decodes: dict[str, FakeDecode] = field(default_factory=dict)
    epoch: int = 0
    unread: deque[messages.Message] = field(default_factory=deque)
    hangs: bool = False


@dataclass
class World:
    policy: str = "continuous-parallel"
    options: PolicyOptions = field(default_factory=PolicyOptions)
    profiles: tuple[Profile, ...] = ()
    patience: Patience = field(default_factory=Patience)
    max_attempts: int = 50
    drift: float = 1.0
    now: float = 0.0
    epoch: int = 0
    unets: dict[str, FakeUnet] = field(default_factory=dict)
    vaes: dict[str, FakeVae] = field(default_factory=dict)
    mail: deque[Event] = field(default_factory=deque)
    open_requests: dict[str, messages.GenerateImage] = field(default_factory=dict)
    attempts: dict[str, list[str]] = field(default_factory=dict)
    final: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    parked: list[ParkEvent] = field(default_factory=list)
    lapsed: set[str] = field(default_factory=set)
    lost_kinds: list[type[messages.Message]] = field(default_factory=list)
    ran: set[tuple[str, str, int]] = field(default_factory=set)
    states: dict[tuple[str, str], int] = field(default_factory=dict)
    num_incarnations: int = 0
    num_latents: int = 0
    log: list[tuple[Event, float, list[Command]]] = field(default_factory=list)
    began_at: float = 0.0

    def __post_init__(self) -> None:
        self.restart_scheduler()

    # --- what happens to the scheduler ---

    def restart_scheduler(self) -> None:
        self.epoch += 1_000
        self.mail.clear()
        self.log.clear()
        self.began_at = self.now
        self.core = self._make_core()
        for request_id, request in list(self.open_requests.items()):
            tokens = self.attempts.get(request_id, [])
            self.feed(
                RequestRecovered(
                    request=request,
                    attempt=tokens[-1] if tokens else "",
                    num_attempts=len(tokens),
                    resume_step=self.states.get((request_id, tokens[-1]), 0) if tokens else 0,
                )
            )
        for worker in [*self.unets.values(), *self.vaes.values()]:
            if worker.info.incarnation not in self.lapsed:
                self.feed(messages.WorkerRegistered(worker=worker.info))

    def _make_core(self) -> Core:
        return Core(
            epoch=self.epoch,
            policy=TouchyPolicy(make_policy(self.policy, self.options)),
            settings=CoreSettings(
                max_attempts=self.max_attempts,
                recovery_s=3.0,
                profiles=self.profiles,
                patience=self.patience,
            ),
            now=self.began_at,
        )

    def replay(self) -> None:
        """The same events give another core the same commands."""
        other = self._make_core()
        for event, now, commands in self.log:
            assert other.on_event(event, now) == commands

    def submit(self, request: messages.GenerateImage) -> None:
        self.open_requests[request.request_id] = request
        self.feed(request)

    def cancel(self, request_id: str) -> None:
        if self.finish(request_id, "cancelled"):
            self.mail.append(messages.RequestCancelled(request_id=request_id))

    def deliver(self, *, twice: bool = False) -> None:
        message = self.mail.popleft()
        self.feed(message)
        if twice:
            self.feed(message)

    def settle(self) -> None:
        """Deliver all mail; no slot runs and nothing is decoded."""
        while self.mail:
            self.deliver()

    def tick(self, seconds: float = 1.0) -> None:
        self.now += seconds
        self.feed(Tick())

    def feed(self, event: Event) -> None:
        commands = self.core.on_event(event, self.now)
        self.log.append((event, self.now, commands))
        for command in commands:
            match command:
                case BeginAttempt(request_id=request_id, attempt=attempt):
                    if request_id in self.open_requests:
                        self.attempts.setdefault(request_id, []).append(attempt)
                    else:
                        refused = AttemptRefused(request_id=request_id, attempt=attempt)
                        self.mail.append(refused)
                case FailRequest(request_id=request_id, code=code):
                    if self.finish(request_id, "failed"):
                        self.failures[request_id] = code
                case ParkEvent():
                    self.parked.append(command)
                case ForgetWorker(incarnation=incarnation):
                    assert incarnation not in self.core.unets
                    if worker := self.unets.get(incarnation) or self.vaes.get(incarnation):
                        worker.unread.clear()
                case Send(incarnation=incarnation, message=message):
                    self._receive(incarnation, message)

    def finish(self, request_id: str, state: str) -> bool:
        if request_id not in self.open_requests:
            return False
        self.final[request_id] = state
        del self.open_requests[request_id]
        return True

    # --- what happens to workers ---

    def start_worker(
        self,
        kind: str,
        worker_id: str,
        *,
        group: str = "g",
        model: str = "m",
        runs_side_by_side: bool = True,
    ) -> None:
        """A worker process begins; one of the same name is gone then."""
        self.num_incarnations += 1
        incarnation = f"{worker_id}-{self.num_incarnations}"
        for workers in (self.unets, self.vaes):
            for name in [n for n, w in workers.items() if w.info.worker_id == worker_id]:
                del workers[name]
                self.lapsed.discard(name)
        info = replace(
            make_worker(kind, worker_id, incarnation, group=group, model=model),
            runs_side_by_side=runs_side_by_side,
        )
        if kind == "unet":
            self.unets[incarnation] = FakeUnet(info)
        else:
            self.vaes[incarnation] = FakeVae(info)
        self.mail.append(messages.WorkerRegistered(worker=info))

    def kill_worker(self, incarnation: str) -> None:
        self.unets.pop(incarnation, None)
        self.vaes.pop(incarnation, None)
        self.lapsed.discard(incarnation)
        self.mail.append(messages.WorkerLost(incarnation=incarnation))

    def lapse(self, incarnation: str) -> None:
        """A worker's heartbeat comes too late; it goes on with what it has."""
        self.lapsed.add(incarnation)
        self.mail.append(messages.WorkerLost(incarnation=incarnation))

    def come_back(self, incarnation: str) -> None:
        """Its heart beats again, in the same incarnation."""
        self.lapsed.discard(incarnation)
        worker = self.unets.get(incarnation) or self.vaes[incarnation]
        self.mail.append(messages.WorkerRegistered(worker=worker.info))

    def hang(self, incarnation: str) -> None:
        """A worker's computation stands still; its heart beats on."""
        (self.unets.get(incarnation) or self.vaes[incarnation]).hangs = True

    def go_on(self, incarnation: str) -> None:
        """It computes again. What it was sent meanwhile is there behind what hung."""
        worker = self.unets.get(incarnation) or self.vaes[incarnation]
        worker.hangs = False
        if isinstance(worker, FakeUnet) and worker.slots:
            self.run_slot(incarnation)
        unread = [*worker.unread]
        worker.unread.clear()
        for message in unread:
            self._receive(incarnation, message)

    def lose_next(self, kind: type[messages.Message]) -> None:
        """The next message of this kind never reaches its worker."""
        self.lost_kinds.append(kind)

    def drain_worker(self, incarnation: str) -> None:
        """A worker is told to stop, between two slots."""
        worker = self.unets.get(incarnation) or self.vaes[incarnation]
        worker.is_draining = True
        self.mail.append(messages.WorkerDraining(incarnation=incarnation))
        if unet := self.unets.get(incarnation):
            for request_id in sorted(unet.held):
                self._hand_back(unet, request_id)

    def _hand_back(self, unet: FakeUnet, request_id: str) -> None:
        attempt, step, _, _ = unet.held[request_id]
        if step and request_id in unet.unmovable:
            return
        del unet.held[request_id]
        if step:
            self.states[request_id, attempt] = step
        self.mail.append(
            messages.RequestHandedBack(
                incarnation=unet.info.incarnation,
                request_id=request_id,
                attempt=attempt,
                step_index=step,
            )
        )

    def leave_if_done(self, incarnation: str) -> None:
        """A drained worker goes once nobody needs it."""
        worker = self.unets.get(incarnation) or self.vaes.get(incarnation)
        if worker is None or not worker.may_leave:
            return
        is_needed = (
            worker.held or worker.finished if isinstance(worker, FakeUnet) else worker.decodes
        )
        if not is_needed:
            self.kill_worker(incarnation)

    def _receive(self, incarnation: str, message: messages.Message) -> None:
        worker = self.unets.get(incarnation) or self.vaes.get(incarnation)
        if type(message) in self.lost_kinds:
            self.lost_kinds.remove(type(message))
            return
        if worker and worker.hangs:
            worker.unread.append(message)
            return
        if worker and worker.is_draining and isinstance(message, messages.LeaveWhenDone):
            worker.may_leave = True
        if worker and worker.is_draining and isinstance(message, messages.BeginEpoch):
            worker.may_leave = False
            self.mail.append(messages.WorkerDraining(incarnation=incarnation))
        if unet := self.unets.get(incarnation):
            self._unet_receives(unet, message)
        elif vae := self.vaes.get(incarnation):
            self._vae_receives(vae, message)
        self.leave_if_done(incarnation)

    def _unet_receives(self, unet: FakeUnet, message: messages.Message) -> None:
        match message:
            case messages.AdmitRequest() if message.epoch >= unet.epoch:
                parameters = message.parameters
                guided = parameters.guidance_scale > 1
                step = message.resume_step
                place = (message.request_id, message.attempt)
                assert step == self.states.get(place, 0), f"{place} resumes at {step}"
                if unet.is_draining:
                    self.mail.append(
                        messages.RequestHandedBack(
                            incarnation=unet.info.incarnation,
                            request_id=message.request_id,
                            attempt=message.attempt,
                            step_index=step,
                        )
                    )
                    return
                self.states.pop(place, None)
                if parameters.sampler != "ddim":
                    unet.unmovable.add(message.request_id)
                unet.held[message.request_id] = (
                    message.attempt,
                    step,
                    parameters.num_inference_steps,
                    guided,
                )
                self.mail.append(
                    messages.RequestAdmitted(
                        incarnation=unet.info.incarnation,
                        request_id=message.request_id,
                        attempt=message.attempt,
                        num_forwards=parameters.num_inference_steps,
                        is_guided=guided,
                        step_index=step,
                        warnings=warnings_of(message.request_id),
                    )
                )
            case messages.DenoiseSlot() if message.epoch >= unet.epoch:
                unet.slots.append(message)
            case messages.MeasureSlot():
                assert not unet.slots, "measured while a slot waits"
                self.mail.append(
                    messages.SlotMeasured(
                        incarnation=unet.info.incarnation,
                        epoch=message.epoch,
                        number=message.number,
                        step_ms=unet.info.step_ms.get(message.rows, 80.0) * 2 / message.threads,
                    )
                )
            case messages.ReleaseRequest(request_id=request_id, attempt=attempt):
                if unet.held.get(request_id, ("",))[0] == attempt:
                    del unet.held[request_id]
            case messages.ReleaseLatents(slot=slot):
                unet.finished.pop(slot, None)
            case messages.BeginEpoch(epoch=epoch) if epoch >= unet.epoch:
                unet.epoch = epoch
                unet.slots.clear()
                held = tuple(
                    messages.HeldRequest(
                        request_id=request_id,
                        attempt=attempt,
                        step_index=step,
                        num_forwards=total,
                        is_guided=guided,
                        num_skipped=len(unet.skipped.get((request_id, attempt), ())),
                        last_full=unet.last_full.get((request_id, attempt), -1),
                        warnings=warnings_of(request_id),
                    )
                    for request_id, (attempt, step, total, guided) in unet.held.items()
                )
                self.mail.append(
                    messages.WorkerAnnounced(
                        incarnation=unet.info.incarnation,
                        epoch=epoch,
                        held=held,
                        finished=tuple(unet.finished.values()),
                    )
                )

    def run_slot(self, incarnation: str) -> None:
        unet = self.unets[incarnation]
        slot = unet.slots.popleft()
        reports, done = [], []
        for row in slot.rows:
            attempt, step, total, guided = unet.held.get(row.request_id, ("", -1, 0, False))
            has_run = attempt == row.attempt and step == row.step_index
            if has_run:
                key = (row.request_id, attempt, step)
                assert key not in self.ran, f"{key} ran twice"
                assert step == 0 or (row.request_id, attempt, step - 1) in self.ran
                self.ran.add(key)
                step += 1
                unet.held[row.request_id] = (attempt, step, total, guided)
                if step == total:
                    done.append((row.request_id, attempt))
            is_held = attempt == row.attempt and step < total
            # Every other step of a guided request may be skipped, after the first two.
            skips = has_run and row.skip and guided and row.step_index % 2 == 0 < row.step_index
            if skips:
                unet.skipped.setdefault((row.request_id, attempt), []).append(row.step_index)
            elif has_run:
                unet.last_full[row.request_id, attempt] = row.step_index
            can_skip = is_held and guided and step % 2 == 0 < step
            reports.append(
                messages.RowReport(
                    request_id=row.request_id,
                    attempt=row.attempt,
                    has_run=has_run,
                    next_step_index=step if is_held else -1,
                    was_skipped=skips,
                    can_skip=can_skip,
                    skip_steps=int(can_skip),
                    skip_error=0.2 if guided else 0.0,
                )
            )
        self.mail.append(
            messages.SlotDenoised(
                incarnation=incarnation,
                epoch=slot.epoch,
                seq=slot.seq,
                duration_ms=10.0 * self.drift,
                rows=tuple(reports),
            )
        )
        for request_id, attempt in done:
            del unet.held[request_id]
            self.num_latents += 1
            handle = messages.TensorHandle(
                kind="shm",
                pool="p",
                owner=incarnation,
                host="h",
                slot=self.num_latents,
                generation=1,
                shape=(1,),
                dtype="float32",
            )
            latents = messages.LatentsFinished(
                incarnation=incarnation,
                request_id=request_id,
                attempt=attempt,
                handle=handle,
                skipped_steps=tuple(unet.skipped.get((request_id, attempt), ())),
                warnings=warnings_of(request_id),
            )
            unet.finished[self.num_latents] = latents
            self.mail.append(latents)
        if unet.is_draining:
            self.leave_if_done(incarnation)

    def _vae_receives(self, vae: FakeVae, message: messages.Message) -> None:
        match message:
            case messages.BeginEpoch(epoch=epoch) if epoch >= vae.epoch:
                vae.epoch = epoch
                vae.decodes.clear()
                self.mail.append(
                    messages.WorkerAnnounced(incarnation=vae.info.incarnation, epoch=epoch)
                )
            case messages.DecodeLatents() if message.epoch >= vae.epoch:
                vae.decodes[message.request_id] = FakeDecode(message)
            case messages.GrantChunks() if message.epoch >= vae.epoch:
                known = vae.decodes.get(message.request_id)
                if known and known.command.attempt == message.attempt:
                    known.granted += message.chunks
                    assert known.granted <= max(vae.info.num_chunks, known.num_chunks)
            case messages.MeasureChunks():
                assert not self.decodable(vae.info.incarnation), "measured while chunks wait"
                self.mail.append(
                    messages.ChunksMeasured(
                        incarnation=vae.info.incarnation,
                        epoch=message.epoch,
                        number=message.number,
                        chunk_ms=(10.0 / message.threads,) * vae.info.num_chunks,
                    )
                )
            case messages.CancelDecode(request_id=request_id, attempt=attempt):
                known = vae.decodes.get(request_id)
                if known and known.command.attempt == attempt:
                    del vae.decodes[request_id]

    def decodable(self, incarnation: str) -> list[str]:
        vae = self.vaes[incarnation]
        if vae.hangs:
            return []
        return [
            name for name, one in vae.decodes.items() if min(one.granted, one.num_chunks) > one.done
        ]

    def decode(self, incarnation: str, request_id: str) -> None:
        """Run the chunks that are granted; the last one commits."""
        decode = self.vaes[incarnation].decodes[request_id]
        command = decode.command
        done = min(decode.granted, decode.num_chunks)
        num_run, decode.done = done - decode.done, done
        self.mail.append(
            messages.ChunksDecoded(
                incarnation=incarnation,
                request_id=request_id,
                attempt=command.attempt,
                chunks_done=decode.done,
                duration_ms=5.0 * num_run * self.drift,
                num_chunks=decode.num_chunks,
            )
        )
        if decode.done < decode.num_chunks:
            return
        del self.vaes[incarnation].decodes[request_id]
        producer = self.unets.get(command.handle.owner)
        if producer is None or command.handle.slot not in producer.finished:
            self.mail.append(
                messages.HandleLost(
                    incarnation=incarnation,
                    request_id=request_id,
                    attempt=command.attempt,
                    reason="gone",
                )
            )
            return
        del producer.finished[command.handle.slot]
        self.leave_if_done(producer.info.incarnation)
        current = self.attempts[request_id][-1] == command.attempt
        if current and self.finish(request_id, "done"):
            self.mail.append(
                messages.ImageDecoded(
                    incarnation=incarnation,
                    request_id=request_id,
                    attempt=command.attempt,
                    decode_ms=20.0,
                    transport="shm",
                )
            )
        else:
            self.mail.append(
                messages.CommitRefused(
                    incarnation=incarnation, request_id=request_id, attempt=command.attempt
                )
            )
        self.leave_if_done(incarnation)

    def run_until_quiet(self, *, max_rounds: int = 3_000) -> None:
        """Let everything happen, in a fixed order, until nothing is left to happen."""
        for _ in range(max_rounds):
            if self.mail:
                self.deliver()
                continue
            busy = False
            for name in list(self.unets):
                if self.unets[name].slots and not self.unets[name].hangs:
                    self.run_slot(name)
                    busy = True
            for name in list(self.vaes):
                for request_id in self.decodable(name):
                    self.decode(name, request_id)
                    busy = True
            if not busy:
                if not self.open_requests:
                    return
                self.tick()
        raise AssertionError(f"not drained: {self.core.requests}")
