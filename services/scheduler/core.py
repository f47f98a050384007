"""The scheduler's pure core: events in, commands out, the clock passed in.

Each handler settles one fact; after every event `dispatch` admits waiting requests, hands finished
latents to VAE workers, and asks the policy for slots and grants.
Nothing here trusts a message to arrive once or in order: what does not fit the current attempt,
step or slot changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import singledispatchmethod
from math import isfinite

from services.scheduler.calibration import Calibration
from services.scheduler.capacity import Capacity, CapacityMeter
from services.scheduler.checks import check, explain
from services.scheduler.commands import Command, ParkEvent
from services.scheduler.corrections import note_chunks, note_slot
from services.scheduler.dispatch import Dispatch
from services.scheduler.endings import Endings
from services.scheduler.events import AttemptRefused, Event, RequestRecovered, Tick
from services.scheduler.fleet import Fleet
from services.scheduler.liveness import Liveness, Patience
from services.scheduler.outbox import Outbox
from services.scheduler.policy import Policy
from services.scheduler.profile import Profile
from services.scheduler.state import AT_UNET, Request, Stage, UnetWorker, VaeWorker
from shared import messages
from shared.errors import ProtocolError

ANSWERS = (
    messages.RequestAdmitted,
    messages.SlotDenoised,
    messages.ChunksDecoded,
    messages.SlotMeasured,
    messages.ChunksMeasured,
    messages.RequestFailed,
)
"""Said by a worker's main loop, one after another, between two computations."""

UNPROCESSABLE = "unprocessable"
"""The code of a request that can't be served whatever is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """What an epoch begins with."""

    max_attempts: int = 5
    """A request that needs more fails; so does one whose decode has begun more often."""
    recovery_s: float = 3.0
    """For workers to announce what they hold."""
    profiles: tuple[Profile, ...] = ()
    """As measured ahead; workers that none was made for are profiled in short."""
    patience: Patience = field(default_factory=Patience)
    """How long workers may take to answer."""


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
        self._now = now
        self._outbox = Outbox(epoch)
        self._dispatch = Dispatch(
            self.requests, self.unets, self.vaes, policy=policy, outbox=self._outbox
        )
        self._endings = Endings(
            self.requests,
            self.unets,
            self.vaes,
            outbox=self._outbox,
            max_attempts=settings.max_attempts,
        )
        self._fleet = Fleet(
            self.unets,
            self.vaes,
            policy=policy,
            profiles=settings.profiles,
            endings=self._endings,
            outbox=self._outbox,
        )
        self._liveness = Liveness(
            self.requests,
            self.unets,
            self.vaes,
            patience=settings.patience,
            endings=self._endings,
            outbox=self._outbox,
        )
        self._capacity = CapacityMeter(self.requests, self.unets, self.vaes, now=now)
        self._calibration = Calibration(
            self.requests,
            self.unets,
            self.vaes,
            fleet=self._fleet,
            outbox=self._outbox,
            is_wanted=policy.plans_overlap,
        )

    def on_event(self, event: Event, now: float) -> list[Command]:
        """What is to be done about an event, in order."""
        return self.on_events([event], now)

    def on_events(self, events: Sequence[Event], now: float) -> list[Command]:
        """The same for events that have come together: all facts first, then one plan."""
        self._now = now
        for event in events:
            self._note_answer(event)
            try:
                check(event)
                self._handle(event)
            except Exception as error:  # noqa: BLE001  whatever it holds, the others go on
                self._park(event, error)
            if self._is_recovering:
                self._end_recovery_when_due(now)
        if not self._is_recovering:
            self._dispatch_all(now)
        return self._outbox.take()

    def capacity(self) -> dict[str, Capacity]:
        """What is ahead of each model's workers, and what more would add."""
        return self._capacity.read()

    def count_stages(self) -> Counter[str]:
        """Open requests by stage."""
        return Counter(request.stage.value for request in self.requests.values())

    def queue_order(self, now: float) -> list[str]:
        """Ids of the waiting requests, the next to be admitted first."""
        return [request.request_id for request in self._dispatch.waiting(now)]

    # --- what can't be taken --------------------------------------------------------------------

    def _park(self, event: Event, error: Exception) -> None:
        """Put an event aside. Whom it is about begins again or fails, since half may be done."""
        self._outbox.add(ParkEvent(event=event, reason=explain(error)))
        match event:
            case messages.GenerateImage(request_id=name) if name in self.requests:
                # An entry that was there already is not what is wrong with the request.
                pass
            case messages.GenerateImage(request_id=name):
                self._outbox.fail(name, code=UNPROCESSABLE, reason=explain(error))
            case RequestRecovered():
                name = event.request.request_id
                self.requests.pop(name, None)
                self._outbox.fail(name, code=UNPROCESSABLE, reason=explain(error))
            case messages.WorkerRegistered(worker=worker):
                # What did not get past the door has touched nobody.
                if not isinstance(error, ProtocolError):
                    self._fleet.discard(worker.incarnation)
            case messages.SlotDenoised() | messages.WorkerAnnounced():
                self._liveness.suspect(event.incarnation, "unusable answer", self._now)
            case _:
                name, attempt = getattr(event, "request_id", ""), getattr(event, "attempt", "")
                self._fail(name, attempt, UNPROCESSABLE, explain(error))

    def _dispatch_all(self, now: float) -> None:
        """Do what follows from the state; without those of whom nothing can follow.

        Each that makes it raise is out, so it comes to an end.
        """
        while True:
            try:
                self._dispatch.run(now, resting=self._calibration.run(now))
            except Exception as error:  # noqa: BLE001  one request must not stop all others
                self._blame(self._dispatch.subject, error)
            else:
                return

    def _blame(self, subject: Request | UnetWorker | None, error: Exception) -> None:
        """Put aside what made the dispatch raise."""
        guilty: Request | UnetWorker | None = subject
        if isinstance(subject, UnetWorker):
            guilty = self._dispatch.find_guilty(subject, self._now) or subject
        elif subject is None and self.requests:
            guilty = self.requests[next(reversed(self.requests))]
        if isinstance(guilty, Request):
            self._outbox.add(ParkEvent(event=guilty.request, reason=explain(error)))
            self._endings.fail(guilty, code=UNPROCESSABLE, reason=explain(error))
        elif isinstance(guilty, UnetWorker):
            registered = messages.WorkerRegistered(worker=guilty.info)
            self._outbox.add(ParkEvent(event=registered, reason=explain(error)))
            self._fleet.discard(guilty.info.incarnation)
        else:
            raise error

    # --- facts ----------------------------------------------------------------------------------

    @singledispatchmethod
    def _handle(self, event: Event) -> None:
        raise TypeError(f"no handler for {type(event).__name__}")

    @_handle.register
    def _on_tick(self, _: Tick) -> None:
        self._liveness.check(self._now)
        self._capacity.learn(self._now)

    @_handle.register
    def _on_generate(self, event: messages.GenerateImage) -> None:
        if event.request_id in self.requests:
            return
        request = Request(request=event, stage=Stage.WAITING, is_guided=_asks_for_guidance(event))
        if not self._dispatch.refuse_hopeless(request, self._now):
            self.requests[event.request_id] = request

    @_handle.register
    def _on_recovered(self, event: RequestRecovered) -> None:
        if event.request.request_id not in self.requests:
            self.requests[event.request.request_id] = Request(
                request=event.request,
                stage=Stage.RECOVERING if event.attempt else Stage.WAITING,
                is_guided=_asks_for_guidance(event.request),
                attempt=event.attempt,
                num_attempts=event.num_attempts,
                latents=event.latents,
                done_step=event.resume_step,
            )

    @_handle.register
    def _on_refused(self, event: AttemptRefused) -> None:
        if self._is_current(event.request_id, event.attempt):
            self._drop(event.request_id)

    @_handle.register
    def _on_cancelled(self, event: messages.RequestCancelled) -> None:
        self._drop(event.request_id)

    @_handle.register
    def _on_registered(self, event: messages.WorkerRegistered) -> None:
        self._fleet.register(event.worker)

    @_handle.register
    def _on_lost(self, event: messages.WorkerLost) -> None:
        self._fleet.lose(event.incarnation, forgets=True)

    @_handle.register
    def _on_draining(self, event: messages.WorkerDraining) -> None:
        self._fleet.drain(event.incarnation)

    @_handle.register
    def _on_handed_back(self, event: messages.RequestHandedBack) -> None:
        request = self._held(event.request_id, event.attempt, event.incarnation)
        if request and request.stage in {Stage.ENCODING, Stage.DENOISING}:
            request.hand_back(event.step_index)

    @_handle.register
    def _on_announced(self, event: messages.WorkerAnnounced) -> None:
        if event.epoch != self.epoch:
            return
        self._liveness.trust(event.incarnation)
        unet = self.unets.get(event.incarnation)
        if unet is None:
            return
        unet.is_announced = True
        for held in event.held:
            request = self._recovering(held.request_id, held.attempt)
            if request:
                request.move_to(Stage.DENOISING)
                self._make_resident(request, event.incarnation, held.num_forwards, held.is_guided)
                request.next_step = request.done_step = held.step_index
                request.num_skipped, request.last_full = held.num_skipped, held.last_full
                request.warnings = held.warnings
                request.asked_at = self._now
            elif not self._held(held.request_id, held.attempt, event.incarnation):
                self._outbox.release(event.incarnation, held.request_id, held.attempt)
        for latents in event.finished:
            request = self._recovering(latents.request_id, latents.attempt)
            if request:
                self._have_latents(request, latents)
            elif not self._is_current(latents.request_id, latents.attempt):
                self._outbox.release_latents(latents)

    @_handle.register
    def _on_admitted(self, event: messages.RequestAdmitted) -> None:
        request = self._held(event.request_id, event.attempt, event.incarnation)
        if request is None or request.stage is not Stage.ENCODING:
            return
        request.move_to(Stage.DENOISING)
        self._make_resident(request, event.incarnation, event.num_forwards, event.is_guided)
        request.next_step = request.done_step = event.step_index
        self._capacity.note_prompt(request)
        request.num_skipped = event.num_skipped
        request.warnings = event.warnings
        self._outbox.report([request])

    @_handle.register
    def _on_slot(self, event: messages.SlotDenoised) -> None:
        unet = self.unets.get(event.incarnation)
        if unet is None or not any(slot.seq == event.seq for slot in unet.slots):
            return
        note_slot(unet, event, self.requests)
        unet.warm.update(slot.key for slot in unet.slots if slot.seq == event.seq)
        self._close_slots(unet, event.seq)
        for failure in event.failures:
            self._fail(failure.request_id, failure.attempt, failure.code, failure.reason)
        moved = []
        for report in event.rows:
            request = self._held(report.request_id, report.attempt, event.incarnation)
            if request is None or request.stage is not Stage.DENOISING:
                continue
            is_held = report.next_step_index >= 0
            if not is_held and not report.has_run:
                self._endings.restart(request, "lost by worker")
                continue
            # A row that ran and is not held any more was the request's last.
            request.done_step = report.next_step_index if is_held else request.num_forwards
            request.skip_steps = report.skip_steps if report.can_skip else 0
            error = report.skip_error
            request.skip_error = (error if isfinite(error) else 1.0) or request.skip_error
            request.asked_at = self._now
            if report.has_run:
                self._capacity.note_step(request)
            request.num_skipped += report.was_skipped
            if report.has_run and not report.was_skipped:
                request.last_full = max(request.last_full, request.done_step - 1)
            if not request.slots_in_flight:
                request.next_step = request.done_step
            moved.append(request)
        self._outbox.report(moved)
        self._dispatch.adjust_threshold(unet, self._now)

    def _close_slots(self, unet: UnetWorker, seq: int) -> None:
        """The slot `seq` is over, and so is any before it."""
        unet.rests_since = self._now
        while unet.slots and unet.slots[0].seq <= seq:
            for row in unet.slots.popleft().rows:
                request = self._held(row.request_id, row.attempt, unet.info.incarnation)
                if request:
                    request.slots_in_flight -= 1

    @_handle.register
    def _on_latents(self, event: messages.LatentsFinished) -> None:
        request = self._current(event.request_id, event.attempt, Stage.DENOISING, Stage.RECOVERING)
        if request is None:
            if not self._is_current(event.request_id, event.attempt):
                self._outbox.release_latents(event)
            return
        self._have_latents(request, event)
        self._outbox.report([request])

    def _have_latents(self, request: Request, latents: messages.LatentsFinished) -> None:
        request.latents = latents
        request.latents_at = self._now
        request.warnings = latents.warnings or request.warnings
        request.move_to(Stage.LATENTS)

    @_handle.register
    def _on_chunks(self, event: messages.ChunksDecoded) -> None:
        request = self._current(event.request_id, event.attempt, Stage.DECODING)
        if request and request.vae == event.incarnation:
            note_chunks(request, event, self._fleet.unets_beside(event.incarnation), self._now)
            request.done_chunks = max(request.done_chunks, event.chunks_done)
            request.asked_at = self._now
            if event.num_chunks:
                self.vaes[request.vae].chunk_counts[request.batch_key] = event.num_chunks

    @_handle.register
    def _on_decoded(self, event: messages.ImageDecoded) -> None:
        # The commit has made it final, whichever worker it came from.
        request = self.requests.get(event.request_id)
        if request:
            self._capacity.note_decode(request)
            if vae := self.vaes.get(event.incarnation):
                vae.warm.add(request.batch_key)
        self._drop(event.request_id, committed_by=event.incarnation)

    @_handle.register
    def _on_commit_refused(self, event: messages.CommitRefused) -> None:
        request = self._current(event.request_id, event.attempt, Stage.DECODING)
        if request and request.vae == event.incarnation:
            # If it is final, the store says so when the next attempt is to begin.
            self._endings.restart(request, "commit refused")

    @_handle.register
    def _on_slot_measured(self, event: messages.SlotMeasured) -> None:
        self._calibration.note_slot(event)

    @_handle.register
    def _on_chunks_measured(self, event: messages.ChunksMeasured) -> None:
        self._calibration.note_chunks(event)

    @_handle.register
    def _on_handle_lost(self, event: messages.HandleLost) -> None:
        request = self._current(event.request_id, event.attempt, Stage.DECODING)
        if request and request.vae == event.incarnation:
            self._endings.restart(request, "latents lost")

    @_handle.register
    def _on_failed(self, event: messages.RequestFailed) -> None:
        request = self._current(event.request_id, event.attempt)
        if request is None:
            return
        # A worker that it was taken from has no say any more.
        holder = request.unet if request.stage in AT_UNET else request.vae
        if holder == event.incarnation:
            self._endings.fail(request, code=event.code, reason=event.reason)

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
                self._have_latents(request, request.latents)
            elif request.done_step:
                request.hand_back(request.done_step)
            else:
                self._endings.restart(request, "not held by any worker")

    def _recovering(self, request_id: str, attempt: str) -> Request | None:
        return self._current(request_id, attempt, Stage.RECOVERING)

    def _drop(self, request_id: str, *, committed_by: str = "") -> None:
        """The request is final already."""
        request = self.requests.get(request_id)
        if request:
            self._endings.drop(request, committed_by=committed_by)

    def _fail(self, request_id: str, attempt: str, code: str, reason: str) -> None:
        request = self._current(request_id, attempt)
        if request:
            self._endings.fail(request, code=code, reason=reason)

    def _note_answer(self, event: Event) -> None:
        """What a worker says because it was asked for work shows that it gets on."""
        if isinstance(event, ANSWERS):
            self._liveness.note_answer(event.incarnation, self._now)

    # --- small things ---------------------------------------------------------------------------

    def _current(self, request_id: str, attempt: str, *stages: Stage) -> Request | None:
        request = self.requests.get(request_id)
        if request is None or request.attempt != attempt:
            return None
        return request if not stages or request.stage in stages else None

    def _held(self, request_id: str, attempt: str, unet: str) -> Request | None:
        """The request, if that attempt of it is at, or was denoised by, this UNet worker."""
        request = self._current(request_id, attempt)
        return request if request and request.unet == unet else None

    def _is_current(self, request_id: str, attempt: str) -> bool:
        return self._current(request_id, attempt) is not None

    def _make_resident(
        self, request: Request, unet: str, num_forwards: int, is_guided: bool
    ) -> None:
        request.unet = unet
        request.num_forwards = num_forwards
        request.is_guided = is_guided


def _asks_for_guidance(request: messages.GenerateImage) -> bool:
    """Whether a step takes two rows, as long as no worker has told."""
    return request.parameters.guidance_scale > 1
