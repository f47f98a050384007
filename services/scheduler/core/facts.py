"""What each event says has happened: one handler for each kind, each settles one fact.

Nothing here trusts a message to arrive once or in order: what does not fit the current attempt,
step or slot changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatchmethod

from services.scheduler.core.assignments import Assignments
from services.scheduler.core.calibration import Calibration
from services.scheduler.core.capacity import CapacityMeter
from services.scheduler.core.cluster import Cluster
from services.scheduler.core.corrections import learn_from_chunks, learn_from_slot
from services.scheduler.core.dispatch import Dispatch
from services.scheduler.core.endings import Endings
from services.scheduler.core.events import AttemptRefused, Event, RequestRecovered, Tick
from services.scheduler.core.fleet import Fleet
from services.scheduler.core.liveness import Liveness
from services.scheduler.core.outbox import Outbox
from services.scheduler.core.state import AT_UNET, Request, Stage
from shared import messages

ANSWERS = (
    messages.RequestAdmitted,
    messages.SlotDenoised,
    messages.ChunksDecoded,
    messages.SlotMeasured,
    messages.ChunksMeasured,
    messages.RequestFailed,
)
"""Said by a worker's main loop, one after another, between two computations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The handlers, over a cluster."""

    cluster: Cluster
    assignments: Assignments
    dispatch: Dispatch
    endings: Endings
    fleet: Fleet
    liveness: Liveness
    capacity: CapacityMeter
    calibration: Calibration
    outbox: Outbox

    def note_answer(self, event: Event, now: float) -> None:
        """Note that a worker gets on, where it says something because it was asked for work."""
        if isinstance(event, ANSWERS) and (worker := self.cluster.worker(event.incarnation)):
            self.cluster.note_answer(worker, now)

    @singledispatchmethod
    def settle(self, event: Event, now: float) -> None:
        """Change the cluster by what has happened, and send what follows from it at once.

        Raises:
            TypeError: There is no handler for this kind of event.
        """
        del now
        raise TypeError(f"no handler for {type(event).__name__}")

    # --- requests -------------------------------------------------------------------------------

    @settle.register
    def _(self, event: messages.GenerateImage, now: float) -> None:
        if event.request_id in self.cluster.requests:
            return
        request = Request(request=event, stage=Stage.WAITING, is_guided=_asks_for_guidance(event))
        if not self.assignments.refuse_hopeless(request, now):
            self.cluster.add(request)

    @settle.register
    def _(self, event: RequestRecovered, now: float) -> None:
        del now
        if event.request.request_id not in self.cluster.requests:
            self.cluster.add(
                Request(
                    request=event.request,
                    stage=Stage.RECOVERING if event.attempt else Stage.WAITING,
                    is_guided=_asks_for_guidance(event.request),
                    attempt=event.attempt,
                    num_attempts=event.num_attempts,
                    latents=event.latents,
                    done_step=event.resume_step,
                )
            )

    @settle.register
    def _(self, event: AttemptRefused, now: float) -> None:
        del now
        if request := self.cluster.find(event.request_id, event.attempt):
            self.endings.drop(request)

    @settle.register
    def _(self, event: messages.RequestCancelled, now: float) -> None:
        del now
        if request := self.cluster.requests.get(event.request_id):
            self.endings.drop(request)

    # --- workers --------------------------------------------------------------------------------

    @settle.register
    def _(self, event: messages.WorkerRegistered, now: float) -> None:
        del now
        self.fleet.register(event.worker)

    @settle.register
    def _(self, event: messages.WorkerLost, now: float) -> None:
        del now
        self.fleet.lose(event.incarnation, forgets=True)

    @settle.register
    def _(self, event: messages.WorkerDraining, now: float) -> None:
        del now
        self.fleet.drain(event.incarnation)

    @settle.register
    def _(self, event: messages.RequestHandedBack, now: float) -> None:
        del now
        request = self.cluster.find_at(event.request_id, event.attempt, event.incarnation)
        if request and request.stage in AT_UNET:
            self.cluster.hand_back(request, event.step_index)

    @settle.register
    def _(self, event: messages.WorkerAnnounced, now: float) -> None:
        if event.epoch != self.cluster.epoch:
            return
        if worker := self.cluster.worker(event.incarnation):
            self.cluster.trust(worker)
        unet = self.cluster.unets.get(event.incarnation)
        if unet is None:
            return
        self.cluster.note_announced(unet)
        for held in event.held:
            self._find_held(held, event.incarnation, now)
        for latents in event.finished:
            request = self.cluster.find(latents.request_id, latents.attempt)
            if request is None:
                self.outbox.release_latents(latents)
            elif request.stage is Stage.RECOVERING:
                self.cluster.have_latents(request, latents, now)

    def _find_held(self, held: messages.HeldRequest, unet: str, now: float) -> None:
        """Go on with a request that a worker holds, or let the worker forget it."""
        request = self.cluster.find(held.request_id, held.attempt, Stage.RECOVERING)
        if request:
            self.cluster.hold_resident(
                request,
                unet,
                num_forwards=held.num_forwards,
                is_guided=held.is_guided,
                step_index=held.step_index,
                num_skipped=held.num_skipped,
                warnings=held.warnings,
                last_full=held.last_full,
            )
            self.cluster.expect_answer(request, now)
        elif not self.cluster.find_at(held.request_id, held.attempt, unet):
            self.outbox.release(unet, held.request_id, held.attempt)

    # --- denoising ------------------------------------------------------------------------------

    @settle.register
    def _(self, event: messages.RequestAdmitted, now: float) -> None:
        del now
        request = self.cluster.find_at(event.request_id, event.attempt, event.incarnation)
        if request is None or request.stage is not Stage.ENCODING:
            return
        self.cluster.hold_resident(
            request,
            event.incarnation,
            num_forwards=event.num_forwards,
            is_guided=event.is_guided,
            step_index=event.step_index,
            num_skipped=event.num_skipped,
            warnings=event.warnings,
        )
        self.capacity.note_prompt(request)
        self.outbox.report([request])

    @settle.register
    def _(self, event: messages.SlotDenoised, now: float) -> None:
        unet = self.cluster.unets.get(event.incarnation)
        if unet is None or not any(slot.seq == event.seq for slot in unet.slots):
            return
        learn_from_slot(self.cluster, unet, event)
        self.cluster.close_slots(unet, event.seq, now)
        for failure in event.failures:
            if request := self.cluster.find(failure.request_id, failure.attempt):
                self.endings.fail(request, code=failure.code, reason=failure.reason)
        moved = {}
        for report in event.rows:
            if request := self._settle_row(report, event.incarnation, now):
                moved[request.request_id] = request
        has_run = {report.request_id for report in event.rows if report.has_run}
        self.capacity.note_steps(moved[name] for name in moved if name in has_run)
        self.outbox.report(moved.values())
        self.dispatch.adjust_threshold(unet, now)

    def _settle_row(self, report: messages.RowReport, unet: str, now: float) -> Request | None:
        """Return the request that a slot's row has moved, None where it has moved none."""
        request = self.cluster.find_at(report.request_id, report.attempt, unet)
        if request is None or request.stage is not Stage.DENOISING:
            return None
        if report.next_step_index < 0 and not report.has_run:
            self.endings.restart(request, "lost by worker")
            return None
        self.cluster.note_row(request, report, now)
        return request

    @settle.register
    def _(self, event: messages.LatentsFinished, now: float) -> None:
        request = self.cluster.find(event.request_id, event.attempt)
        if request is None:
            self.outbox.release_latents(event)
        elif request.stage in {Stage.DENOISING, Stage.RECOVERING}:
            self.cluster.have_latents(request, event, now)
            self.outbox.report([request])

    # --- decoding -------------------------------------------------------------------------------

    @settle.register
    def _(self, event: messages.ChunksDecoded, now: float) -> None:
        if request := self._decoded_by(event.request_id, event.attempt, event.incarnation):
            learn_from_chunks(self.cluster, request, event, now)
            self.cluster.note_chunks(request, event.chunks_done, event.num_chunks, now)

    @settle.register
    def _(self, event: messages.ImageDecoded, now: float) -> None:
        del now
        # The commit has made it final, whichever worker it came from.
        if request := self.cluster.requests.get(event.request_id):
            self.capacity.note_decode(request)
            if vae := self.cluster.vaes.get(event.incarnation):
                self.cluster.note_decoded(vae, request.batch_key)
            self.endings.drop(request, committed_by=event.incarnation)

    @settle.register
    def _(self, event: messages.CommitRefused, now: float) -> None:
        del now
        if request := self._decoded_by(event.request_id, event.attempt, event.incarnation):
            # If it is final, the store says so when the next attempt is to begin.
            self.endings.restart(request, "commit refused")

    @settle.register
    def _(self, event: messages.HandleLost, now: float) -> None:
        del now
        if request := self._decoded_by(event.request_id, event.attempt, event.incarnation):
            self.endings.restart(request, "latents lost")

    def _decoded_by(self, request_id: str, attempt: str, vae: str) -> Request | None:
        """Return the request if that attempt of it is being decoded by this VAE worker."""
        request = self.cluster.find(request_id, attempt, Stage.DECODING)
        return request if request and request.vae == vae else None

    # --- the rest -------------------------------------------------------------------------------

    @settle.register
    def _(self, event: messages.RequestFailed, now: float) -> None:
        del now
        request = self.cluster.find(event.request_id, event.attempt)
        if request is None:
            return
        # A worker that it was taken from has no say any more.
        holder = request.unet if request.stage in AT_UNET else request.vae
        if holder == event.incarnation:
            self.endings.fail(request, code=event.code, reason=event.reason)

    @settle.register
    def _(self, event: messages.SlotMeasured, now: float) -> None:
        del now
        self.calibration.note_slot(event)

    @settle.register
    def _(self, event: messages.ChunksMeasured, now: float) -> None:
        del now
        self.calibration.note_chunks(event)

    @settle.register
    def _(self, event: Tick, now: float) -> None:
        del event
        self.liveness.check(now)
        self.capacity.learn(now)


def _asks_for_guidance(request: messages.GenerateImage) -> bool:
    """Return whether a step takes two rows, as long as no worker has told."""
    return request.parameters.guidance_scale > 1
