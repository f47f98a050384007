"""The scheduler's pure core: events in, commands out, the clock passed in.

It owns all state changes. Each handler settles one fact; after every event `_schedule` admits
waiting requests, hands finished latents to VAE workers, and asks the policy for slots and grants.
Nothing here trusts a message to arrive once or in order: what does not fit the current attempt,
step or slot changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import singledispatchmethod

from services.scheduler.commands import (
    BeginAttempt,
    Command,
    FailRequest,
    ForgetWorker,
    Lane,
    ReportProgress,
    RestartRequest,
    Send,
)
from services.scheduler.events import Event, RequestRecovered, Tick
from services.scheduler.policies import Decode, GroupView, Policy, by_urgency
from services.scheduler.profile import StepProfile
from services.scheduler.state import Request, SlotInFlight, Stage, UnetWorker, VaeWorker
from shared import keys, messages
from shared.messages import RequestProgress, WorkerInfo

DECODES_PER_WORKER = 2
"""At a VAE worker at once: one decodes, the next has arrived already."""

ADMISSION_FACTOR = 2
"""Resident rows may reach this many knees, so that a full slot never waits for a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """max_attempts: a request that needs more fails. recovery_s: for workers to announce."""

    max_attempts: int = 5
    recovery_s: float = 3.0


class Core:
    """State and rules of one epoch.

    Args:
        epoch: This scheduler's life; part of every attempt token and the base of slot numbers.
        policy: Decides slots and grants.
        settings: Limits.
        now: The start.
    """

    def __init__(self, *, epoch: int, policy: Policy, settings: CoreSettings, now: float) -> None:
        self.epoch = epoch
        self.requests: dict[str, Request] = {}
        self.unets: dict[str, UnetWorker] = {}
        self.vaes: dict[str, VaeWorker] = {}
        self._policy = policy
        self._settings = settings
        self._recovers_until = now + settings.recovery_s
        self._is_recovering = True
        self._next_seq = epoch
        self._next_attempt = 1
        self._commands: list[Command] = []

    def on_event(self, event: Event, now: float) -> list[Command]:
        """What is to be done about an event, in order."""
        self._commands = []
        self._handle(event)
        if self._is_recovering:
            self._end_recovery_when_due(now)
        if not self._is_recovering:
            self._schedule(now)
        return self._commands

    def count_stages(self) -> Counter[str]:
        """Open requests by stage."""
        return Counter(request.stage.value for request in self.requests.values())

    def queue_order(self, now: float) -> list[str]:
        """Ids of the waiting requests, the next to be admitted first."""
        return [request.request_id for request in self._waiting(now)]

    # --- facts ----------------------------------------------------------------------------------

    @singledispatchmethod
    def _handle(self, event: Event) -> None:
        raise TypeError(f"no handler for {type(event).__name__}")

    @_handle.register
    def _on_tick(self, event: Tick) -> None:
        pass

    @_handle.register
    def _on_generate(self, event: messages.GenerateImage) -> None:
        if event.request_id not in self.requests:
            self.requests[event.request_id] = Request(request=event, stage=Stage.WAITING)

    @_handle.register
    def _on_recovered(self, event: RequestRecovered) -> None:
        if event.request.request_id not in self.requests:
            self.requests[event.request.request_id] = Request(
                request=event.request,
                stage=Stage.RECOVERING if event.attempt else Stage.WAITING,
                attempt=event.attempt,
                num_attempts=event.num_attempts,
                latents=event.latents,
            )

    @_handle.register
    def _on_cancelled(self, event: messages.RequestCancelled) -> None:
        self._drop(event.request_id)

    @_handle.register
    def _on_registered(self, event: messages.WorkerRegistered) -> None:
        info = event.worker
        for known in self._infos():
            if (known.worker_id, known.kind) == (info.worker_id, info.kind):
                self._lose_worker(known.incarnation, forgets=known.incarnation != info.incarnation)
        if info.kind == "unet":
            profile = StepProfile(step_ms=info.step_ms)
            self.unets[info.incarnation] = UnetWorker(info=info, profile=profile)
        else:
            self.vaes[info.incarnation] = VaeWorker(info=info)
        self._send(info.incarnation, "control", messages.BeginEpoch(epoch=self.epoch))

    @_handle.register
    def _on_lost(self, event: messages.WorkerLost) -> None:
        self._lose_worker(event.incarnation, forgets=True)

    @_handle.register
    def _on_draining(self, event: messages.WorkerDraining) -> None:
        worker = self.unets.get(event.incarnation) or self.vaes.get(event.incarnation)
        if worker:
            worker.is_draining = True

    @_handle.register
    def _on_announced(self, event: messages.WorkerAnnounced) -> None:
        unet = self.unets.get(event.incarnation)
        if unet is None or event.epoch != self.epoch:
            return
        unet.is_announced = True
        for held in event.held:
            request = self._recovering(held.request_id, held.attempt)
            if request:
                request.move_to(Stage.DENOISING)
                self._make_resident(request, event.incarnation, held.num_forwards, held.is_guided)
                request.next_step = request.done_step = held.step_index
            elif not self._is_current(held.request_id, held.attempt):
                self._release(event.incarnation, held.request_id, held.attempt)
        for latents in event.finished:
            request = self._recovering(latents.request_id, latents.attempt)
            if request:
                request.latents = latents
                request.move_to(Stage.LATENTS)
            elif not self._is_current(latents.request_id, latents.attempt):
                self._release_latents(latents)

    @_handle.register
    def _on_admitted(self, event: messages.RequestAdmitted) -> None:
        request = self._current(event.request_id, event.attempt, Stage.ENCODING)
        if request is None:
            return
        request.move_to(Stage.DENOISING)
        self._make_resident(request, event.incarnation, event.num_forwards, event.is_guided)
        request.warnings = event.warnings
        self._report([request])

    @_handle.register
    def _on_slot(self, event: messages.SlotDenoised) -> None:
        unet = self.unets.get(event.incarnation)
        if unet is None or not any(slot.seq == event.seq for slot in unet.slots):
            return
        self._close_slots(unet, event.seq)
        for failure in event.failures:
            self._fail(failure.request_id, failure.attempt, failure.code, failure.reason)
        moved = []
        for report in event.rows:
            request = self._current(report.request_id, report.attempt, Stage.DENOISING)
            if request is None:
                continue
            is_held = report.next_step_index >= 0
            if not is_held and not report.has_run:
                self._restart(request, "lost by worker")
                continue
            # A row that ran and is not held any more was the request's last.
            request.done_step = report.next_step_index if is_held else request.num_forwards
            request.can_skip = report.can_skip
            if not request.slots_in_flight:
                request.next_step = request.done_step
            moved.append(request)
        self._report(moved)

    def _close_slots(self, unet: UnetWorker, seq: int) -> None:
        """The slot `seq` is over, and so is any before it."""
        while unet.slots and unet.slots[0].seq <= seq:
            for row in unet.slots.popleft().rows:
                request = self._current(row.request_id, row.attempt)
                if request:
                    request.slots_in_flight -= 1

    @_handle.register
    def _on_latents(self, event: messages.LatentsFinished) -> None:
        request = self._current(event.request_id, event.attempt, Stage.DENOISING, Stage.RECOVERING)
        if request is None:
            if not self._is_current(event.request_id, event.attempt):
                self._release_latents(event)
            return
        request.move_to(Stage.LATENTS)
        request.latents = event
        self._report([request])

    @_handle.register
    def _on_chunks(self, event: messages.ChunksDecoded) -> None:
        request = self._current(event.request_id, event.attempt, Stage.DECODING)
        if request and request.vae == event.incarnation:
            request.done_chunks = event.chunks_done

    @_handle.register
    def _on_decoded(self, event: messages.ImageDecoded) -> None:
        # The commit has made it final, whichever worker it came from.
        self._drop(event.request_id, committed_by=event.incarnation)

    @_handle.register
    def _on_handle_lost(self, event: messages.HandleLost) -> None:
        request = self._current(event.request_id, event.attempt, Stage.DECODING)
        if request and request.vae == event.incarnation:
            self._restart(request, "latents lost")

    @_handle.register
    def _on_failed(self, event: messages.RequestFailed) -> None:
        self._fail(event.request_id, event.attempt, event.code, event.reason)

    # --- scheduling -----------------------------------------------------------------------------

    def _schedule(self, now: float) -> None:
        self._admit_waiting(now)
        self._assign_decodes()
        for unet in self.unets.values():
            self._plan(unet, now)
        self._grant_off_device()

    def _waiting(self, now: float) -> list[Request]:
        waiting = (r for r in self.requests.values() if r.stage is Stage.WAITING)
        return by_urgency(waiting, now)

    def _admit_waiting(self, now: float) -> None:
        resident: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        for request in self.requests.values():
            if request.stage in {Stage.ENCODING, Stage.DENOISING}:
                resident[request.unet] += 1
                rows[request.unet] += request.rows
        for request in self._waiting(now):
            room = [
                unet
                for name, unet in self.unets.items()
                if not unet.is_draining
                and resident[name] < unet.info.max_requests
                and rows[name] < ADMISSION_FACTOR * max(2, unet.profile.knee)
                and unet.info.model_id == request.request.parameters.model
            ]
            if not room:
                continue
            unet = min(
                room,
                key=lambda unet: (
                    rows[unet.info.incarnation] / unet.profile.knee,
                    unet.info.incarnation,
                ),
            )
            name = unet.info.incarnation
            self._admit(request, unet)
            resident[name] += 1
            rows[name] += request.rows

    def _admit(self, request: Request, unet: UnetWorker) -> None:
        request.move_to(Stage.ENCODING)
        request.attempt = f"{self.epoch}-{self._next_attempt}"
        request.num_attempts += 1
        self._next_attempt += 1
        request.unet = unet.info.incarnation
        self._commands.append(BeginAttempt(request_id=request.request_id, attempt=request.attempt))
        admit = messages.AdmitRequest(
            epoch=self.epoch,
            request_id=request.request_id,
            attempt=request.attempt,
            parameters=request.request.parameters,
        )
        self._send(request.unet, "control", admit)

    def _assign_decodes(self) -> None:
        for request in self.requests.values():
            if request.stage is not Stage.LATENTS:
                continue
            room = [
                vae
                for vae in self.vaes.values()
                if not vae.is_draining
                and len(vae.decodes) < DECODES_PER_WORKER
                and vae.info.model_id == request.request.parameters.model
            ]
            if not room:
                continue
            busy_groups = {unet.info.device_group for unet in self.unets.values()}
            vae = min(
                room,
                key=lambda vae: (
                    len(vae.decodes),
                    vae.info.device_group in busy_groups,
                    vae.info.incarnation,
                ),
            )
            self._assign(request, vae)

    def _assign(self, request: Request, vae: VaeWorker) -> None:
        assert request.latents is not None
        request.move_to(Stage.DECODING)
        request.vae = vae.info.incarnation
        request.granted_chunks = request.done_chunks = 0
        vae.decodes.append(request.request_id)
        owner = request.latents.handle.owner
        decode = messages.DecodeLatents(
            epoch=self.epoch,
            request_id=request.request_id,
            attempt=request.attempt,
            handle=request.latents.handle,
            parameters=request.request.parameters,
            skipped_steps=request.latents.skipped_steps,
            warnings=request.warnings,
            release_to=keys.control(owner),
        )
        self._send(request.vae, "work", decode)

    def _plan(self, unet: UnetWorker, now: float) -> None:
        while True:
            plan = self._policy.plan(self._view(unet, now))
            for grant in plan.grants:
                self._grant(grant.request_id, grant.chunks, grant.threads)
            if plan.rows:
                self._send_slot(unet, plan.rows, plan.kind, plan.threads)
            if not plan.rows:
                return

    def _view(self, unet: UnetWorker, now: float) -> GroupView:
        group = unet.info.device_group
        return GroupView(
            unet=unet,
            requests=[r for r in self.requests.values() if r.unet == unet.info.incarnation],
            decodes=[
                Decode(request=self.requests[request_id], num_chunks=vae.info.num_chunks)
                for vae in self.vaes.values()
                if vae.info.device_group == group
                for request_id in vae.decodes
            ],
            now=now,
        )

    def _send_slot(
        self, unet: UnetWorker, rows: tuple[messages.SlotRow, ...], kind: str, threads: int
    ) -> None:
        self._next_seq += 1
        unet.num_slots += 1
        unet.slots.append(SlotInFlight(seq=self._next_seq, kind=kind, rows=rows))
        for row in rows:
            request = self.requests[row.request_id]
            request.next_step += 1
            request.slots_in_flight += 1
            unet.turns[request.batch_key] = unet.num_slots
        slot = messages.DenoiseSlot(
            epoch=self.epoch, seq=self._next_seq, kind=kind, threads=threads, rows=rows
        )
        self._send(unet.info.incarnation, "work", slot)

    def _grant(self, request_id: str, chunks: int, threads: int) -> None:
        request = self.requests[request_id]
        request.granted_chunks += chunks
        grant = messages.GrantChunks(
            epoch=self.epoch,
            request_id=request_id,
            attempt=request.attempt,
            chunks=chunks,
            threads=threads,
        )
        self._send(request.vae, "work", grant)

    def _grant_off_device(self) -> None:
        busy_groups = {unet.info.device_group for unet in self.unets.values()}
        for vae in self.vaes.values():
            if vae.info.device_group in busy_groups:
                continue
            for request_id in vae.decodes:
                missing = vae.info.num_chunks - self.requests[request_id].granted_chunks
                if missing > 0:
                    self._grant(request_id, missing, vae.info.threads)

    # --- recovery and loss ----------------------------------------------------------------------

    def _end_recovery_when_due(self, now: float) -> None:
        recovering = [r for r in self.requests.values() if r.stage is Stage.RECOVERING]
        is_settled = not recovering or (
            bool(self.unets) and all(unet.is_announced for unet in self.unets.values())
        )
        if now < self._recovers_until and not is_settled:
            return
        self._is_recovering = False
        for request in recovering:
            if request.latents:
                request.move_to(Stage.LATENTS)
            else:
                self._restart(request, "not held by any worker")

    def _recovering(self, request_id: str, attempt: str) -> Request | None:
        return self._current(request_id, attempt, Stage.RECOVERING)

    def _lose_worker(self, incarnation: str, *, forgets: bool) -> None:
        if self.unets.pop(incarnation, None):
            for request in self._requests_on(incarnation):
                self._restart(request, "unet worker lost")
        vae = self.vaes.pop(incarnation, None)
        for request_id in vae.decodes if vae else ():
            request = self.requests[request_id]
            request.move_to(Stage.LATENTS)
            request.vae = ""
        if forgets:
            self._commands.append(ForgetWorker(incarnation=incarnation))

    def _requests_on(self, unet: str) -> list[Request]:
        at_unet = {Stage.ENCODING, Stage.DENOISING}
        return [r for r in self.requests.values() if r.unet == unet and r.stage in at_unet]

    def _restart(self, request: Request, reason: str) -> None:
        """Give the request up where it is and let it wait for a new attempt, or fail it."""
        self._leave_workers(request)
        if request.num_attempts >= self._settings.max_attempts:
            del self.requests[request.request_id]
            failure = FailRequest(
                request_id=request.request_id,
                code="too_many_attempts",
                reason=f"given up after {request.num_attempts} attempts; the last: {reason}",
            )
            self._commands.append(failure)
            return
        self._commands.append(RestartRequest(request_id=request.request_id, reason=reason))
        request.move_to(Stage.WAITING)
        request.unet = request.vae = request.attempt = ""
        request.latents = None
        request.next_step = request.done_step = request.slots_in_flight = 0
        request.granted_chunks = request.done_chunks = 0

    def _fail(self, request_id: str, attempt: str, code: str, reason: str) -> None:
        if self._current(request_id, attempt):
            self._drop(request_id)
            self._commands.append(FailRequest(request_id=request_id, code=code, reason=reason))

    def _drop(self, request_id: str, *, committed_by: str = "") -> None:
        """The request is final: free whatever workers still hold of it."""
        request = self.requests.get(request_id)
        if request is None:
            return
        self._leave_workers(request, committed_by=committed_by)
        del self.requests[request_id]

    def _leave_workers(self, request: Request, *, committed_by: str = "") -> None:
        if request.unet in self.unets and request.stage in {Stage.ENCODING, Stage.DENOISING}:
            self._release(request.unet, request.request_id, request.attempt)
        vae = self.vaes.get(request.vae)
        if vae and request.request_id in vae.decodes:
            vae.decodes.remove(request.request_id)
            if committed_by != request.vae:
                cancel = messages.CancelDecode(
                    epoch=self.epoch, request_id=request.request_id, attempt=request.attempt
                )
                self._send(request.vae, "control", cancel)
        if request.latents and not committed_by:
            self._release_latents(request.latents)

    # --- small things ---------------------------------------------------------------------------

    def _current(self, request_id: str, attempt: str, *stages: Stage) -> Request | None:
        request = self.requests.get(request_id)
        if request is None or request.attempt != attempt:
            return None
        return request if not stages or request.stage in stages else None

    def _is_current(self, request_id: str, attempt: str) -> bool:
        return self._current(request_id, attempt) is not None

    def _make_resident(
        self, request: Request, unet: str, num_forwards: int, is_guided: bool
    ) -> None:
        request.unet = unet
        request.num_forwards = num_forwards
        request.is_guided = is_guided

    def _infos(self) -> list[WorkerInfo]:
        return [unet.info for unet in self.unets.values()] + [
            vae.info for vae in self.vaes.values()
        ]

    def _send(self, incarnation: str, lane: Lane, message: messages.Message) -> None:
        self._commands.append(Send(incarnation=incarnation, lane=lane, message=message))

    def _release(self, unet: str, request_id: str, attempt: str) -> None:
        release = messages.ReleaseRequest(epoch=self.epoch, request_id=request_id, attempt=attempt)
        self._send(unet, "control", release)

    def _release_latents(self, latents: messages.LatentsFinished) -> None:
        handle = latents.handle
        release = messages.ReleaseLatents(slot=handle.slot, generation=handle.generation)
        self._send(handle.owner, "control", release)

    def _report(self, requests: Iterable[Request]) -> None:
        items = tuple(
            RequestProgress(
                request_id=request.request_id,
                state=request.stage.value,
                step=request.done_step,
                num_steps=request.num_forwards,
            )
            for request in requests
        )
        if items:
            self._commands.append(ReportProgress(items=items))
