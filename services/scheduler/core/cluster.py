"""The cluster: all requests and workers of one epoch, and everything that may happen to them.

Whoever has the cluster may read it; it changes here and nowhere else, by methods that are named
after what has happened. Each leaves requests and workers in agreement with each other.
"""

from __future__ import annotations

from math import isfinite

from services.scheduler.core.state import (
    AT_UNET,
    TRANSITIONS,
    BatchKey,
    Outlook,
    Request,
    SlotInFlight,
    Stage,
    UnetWorker,
    Usage,
    VaeWorker,
)
from services.scheduler.devices.drift import Drift
from services.scheduler.devices.profile import Profile
from services.scheduler.planning.threshold import Threshold
from shared.errors import IllegalTransitionError
from shared.messages import LatentsFinished, RowReport


class Cluster:
    """The state of one epoch.

    Args:
        epoch: This scheduler's life; part of every attempt token and the base of slot numbers.
        profiles: As measured ahead; workers that none was made for are profiled in short.
    """

    def __init__(self, epoch: int, profiles: tuple[Profile, ...] = ()) -> None:
        self.epoch = epoch
        self.profiles = profiles
        self.requests: dict[str, Request] = {}
        self.unets: dict[str, UnetWorker] = {}
        self.vaes: dict[str, VaeWorker] = {}
        self._last_seq = epoch
        self._num_attempts = 0

    # --- what is there --------------------------------------------------------------------------

    @property
    def next_seq(self) -> int:
        """Return the number of the next slot."""
        return self._last_seq + 1

    def worker(self, incarnation: str) -> UnetWorker | VaeWorker | None:
        """Return the worker of either kind, None where it is gone."""
        return self.unets.get(incarnation) or self.vaes.get(incarnation)

    def find(self, request_id: str, attempt: str, *stages: Stage) -> Request | None:
        """Return the request if this is its current attempt, and it is in one of these stages."""
        request = self.requests.get(request_id)
        if request is None or request.attempt != attempt:
            return None
        return request if not stages or request.stage in stages else None

    def find_at(self, request_id: str, attempt: str, unet: str) -> Request | None:
        """Return the request if that attempt of it is at, or was denoised by, this UNet worker."""
        request = self.find(request_id, attempt)
        return request if request and request.unet == unet else None

    def held_by(self, unet: str) -> list[Request]:
        """Return the requests of which a UNet worker holds something."""
        return [
            request
            for request in self.requests.values()
            if request.unet == unet and request.stage in AT_UNET
        ]

    def unets_on(self, device_group: str) -> list[UnetWorker]:
        """Return a device's UNet workers."""
        return [unet for unet in self.unets.values() if unet.info.device_group == device_group]

    def vaes_on(self, device_group: str) -> list[VaeWorker]:
        """Return a device's VAE workers."""
        return [vae for vae in self.vaes.values() if vae.info.device_group == device_group]

    def decodes_on(self, device_group: str) -> list[Request]:
        """Return the requests that a device's VAE workers decode."""
        return [self.requests[name] for vae in self.vaes_on(device_group) for name in vae.decodes]

    # --- a request's way forward ----------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A request is there."""
        self.requests[request.request_id] = request

    def begin_admission(self, request: Request, unet: str, now: float) -> bool:
        """A waiting request goes to a UNet worker; return whether that is a new attempt."""
        self._move(request, Stage.ENCODING)
        request.unet = unet
        request.asked_at = now
        if request.attempt:
            return False
        self._num_attempts += 1
        request.attempt = f"{self.epoch}-{self._num_attempts}"
        request.num_attempts += 1
        return True

    def hold_resident(
        self,
        request: Request,
        unet: str,
        *,
        num_forwards: int,
        is_guided: bool,
        step_index: int,
        num_skipped: int,
        warnings: tuple[str, ...],
        last_full: int | None = None,
    ) -> None:
        """A UNet worker holds the request's latents; this forward comes next."""
        self._move(request, Stage.DENOISING)
        request.unet = unet
        request.num_forwards = num_forwards
        request.is_guided = is_guided
        request.next_step = request.done_step = step_index
        request.num_skipped = num_skipped
        request.warnings = warnings
        if last_full is not None:
            request.last_full = last_full

    def expect_answer(self, request: Request, now: float) -> None:
        """A worker owes an answer about a request from now on."""
        request.asked_at = now

    def send_slot(self, unet: UnetWorker, slot: SlotInFlight, slot_ms: float) -> None:
        """A slot is on its way; its rows count as done. slot_ms: its batch key's turn."""
        self._last_seq = slot.seq
        unet.num_slots += 1
        unet.slots.append(slot)
        unet.turns = unet.turns.after(slot.key, slot_ms)
        for row in slot.rows:
            request = self.requests[row.request_id]
            if not row.skip:
                request.last_full = request.next_step
            request.next_step += 1
            request.slots_in_flight += 1

    def close_slots(self, unet: UnetWorker, seq: int, now: float) -> None:
        """A slot is over, and so is any before it."""
        unet.rests_since = now
        unet.warm.update(slot.key for slot in unet.slots if slot.seq == seq)
        while unet.slots and unet.slots[0].seq <= seq:
            for row in unet.slots.popleft().rows:
                request = self.find_at(row.request_id, row.attempt, unet.info.incarnation)
                if request:
                    request.slots_in_flight -= 1

    def note_row(self, request: Request, report: RowReport, now: float) -> None:
        """A slot's report says how far a request is that was in it."""
        # A row that ran and is not held any more was the request's last.
        is_held = report.next_step_index >= 0
        request.done_step = report.next_step_index if is_held else request.num_forwards
        request.skip_steps = report.skip_steps if report.can_skip else 0
        error = report.skip_error
        request.skip_error = (error if isfinite(error) else 1.0) or request.skip_error
        request.asked_at = now
        request.num_skipped += report.was_skipped
        if report.has_run and not report.was_skipped:
            request.last_full = max(request.last_full, request.done_step - 1)
        if not request.slots_in_flight:
            request.next_step = request.done_step

    def have_latents(self, request: Request, latents: LatentsFinished, now: float) -> None:
        """A request is denoised."""
        self._move(request, Stage.LATENTS)
        request.latents = latents
        request.latents_at = now
        request.warnings = latents.warnings or request.warnings

    def begin_decode(self, request: Request, vae: VaeWorker) -> None:
        """Finished latents go to a VAE worker."""
        self._move(request, Stage.DECODING)
        self._forget_decode(request)
        request.vae = vae.info.incarnation
        request.num_decodes += 1
        vae.decodes.append(request.request_id)

    def grant(self, request: Request, chunks: int, *, is_gap: bool, now: float) -> None:
        """More chunks of a decode may run."""
        if not request.has_chunks_running:
            request.asked_at = now
        request.granted_chunks += chunks
        request.has_gap = is_gap

    def note_chunks(self, request: Request, done: int, num_chunks: int, now: float) -> None:
        """So many chunks of a decode have run. num_chunks: of all of it, 0 for not told."""
        request.done_chunks = max(request.done_chunks, done)
        request.asked_at = now
        if num_chunks:
            self.vaes[request.vae].chunk_counts[request.batch_key] = num_chunks

    # --- and back -------------------------------------------------------------------------------

    def start_over(self, request: Request) -> None:
        """Nothing of the request's attempt is anywhere; it waits for another."""
        self._move(request, Stage.WAITING)
        request.unet = request.attempt = ""
        request.latents = None
        request.next_step = request.done_step = request.slots_in_flight = 0
        request.skip_steps = request.num_skipped = request.num_decodes = 0
        request.last_full = -1
        self._forget_decode(request)

    def hand_back(self, request: Request, step_index: int) -> None:
        """The request waits for another worker, which goes on with its attempt at this step."""
        self._move(request, Stage.WAITING)
        request.unet = ""
        request.next_step = request.done_step = step_index
        request.slots_in_flight = request.skip_steps = 0
        request.last_full = -1

    def leave_vae(self, request: Request) -> bool:
        """No VAE worker has the request any more; return whether one had."""
        vae = self.vaes.get(request.vae)
        if vae is None or request.request_id not in vae.decodes:
            return False
        vae.decodes.remove(request.request_id)
        return True

    def wait_for_vae(self, request: Request) -> None:
        """A decode that was given up waits for another worker."""
        self._move(request, Stage.LATENTS)
        self._forget_decode(request)

    def remove(self, request: Request) -> None:
        """A request is final."""
        del self.requests[request.request_id]

    # --- workers --------------------------------------------------------------------------------

    def add_unet(self, unet: UnetWorker) -> None:
        """A UNet worker is there."""
        self.unets[unet.info.incarnation] = unet

    def add_vae(self, vae: VaeWorker) -> None:
        """A VAE worker is there."""
        self.vaes[vae.info.incarnation] = vae

    def remove_worker(self, incarnation: str) -> None:
        """A worker is gone, whatever it holds."""
        self.unets.pop(incarnation, None)
        self.vaes.pop(incarnation, None)

    def note_announced(self, unet: UnetWorker) -> None:
        """A UNet worker has said what it holds."""
        unet.is_announced = True

    def note_answer(self, worker: UnetWorker | VaeWorker, now: float) -> None:
        """A worker has done something that it was asked for."""
        worker.answered_at = now

    def note_probe(self, worker: UnetWorker | VaeWorker, now: float) -> None:
        """A worker was asked what it holds."""
        worker.probed_at = now

    def note_decoded(self, vae: VaeWorker, key: BatchKey) -> None:
        """A VAE worker has decoded a picture of that size."""
        vae.warm.add(key)

    def drain(self, worker: UnetWorker | VaeWorker) -> None:
        """A worker wants to leave."""
        worker.is_draining = True

    def suspect(self, worker: UnetWorker | VaeWorker) -> None:
        """A worker does not answer; its slots are taken for lost."""
        worker.is_suspect = True
        if isinstance(worker, UnetWorker):
            worker.slots.clear()
            worker.usage.clear()
            worker.outlook = None

    def trust(self, worker: UnetWorker | VaeWorker) -> None:
        """A worker has announced what it holds: nothing old is left that it could do."""
        worker.is_suspect = False

    def add_profile(self, profile: Profile) -> None:
        """A profile was measured while serving."""
        self.profiles = (*self.profiles, profile)

    def use_profile(self, unet: UnetWorker, profile: Profile, *, takes_turns: bool) -> None:
        """A UNet worker is planned by another profile from now on."""
        unet.takes_turns = takes_turns
        unet.profile = profile

    # --- what planning keeps of a device --------------------------------------------------------

    def set_threshold(self, unet: UnetWorker, threshold: Threshold) -> None:
        """The threshold has moved."""
        unet.threshold = threshold

    def set_outlook(self, unet: UnetWorker, outlook: Outlook) -> None:
        """A plan promises this."""
        unet.outlook = outlook

    def set_drift(self, unet: UnetWorker, drift: Drift) -> None:
        """The device is so much slower than its profile."""
        unet.drift = drift

    def spend(self, unet: UnetWorker, usage: Usage) -> None:
        """A slot that is about to be sent, or a gap, takes so much of the device."""
        unet.usage.append(usage)

    def lengthen(self, unet: UnetWorker, seq: int, *, chunks: int, ms: float) -> None:
        """A slot in flight has more chunks beside it than it was sent with."""
        for slot in unet.slots:
            if slot.seq == seq:
                slot.chunks += chunks
        for usage in unet.usage:
            if usage.seq == seq:
                usage.ms += ms

    def note_rest(self, unet: UnetWorker, now: float) -> None:
        """Nothing runs on the device, or did until now."""
        unet.rests_since = now

    def forget_usage(self, unet: UnetWorker) -> None:
        """The device has nothing to do: what was spent before is spent."""
        unet.usage.clear()

    def end_gap(self, unet: UnetWorker, *, overrun_ms: float, now: float) -> None:
        """Chunks in a gap are over; by what they took too long the next slots are shorter."""
        unet.rests_since = now
        if overrun_ms and unet.usage:
            unet.usage[-1].ms += overrun_ms

    def charge(self, unet: UnetWorker, seq: int, ms: float) -> None:
        """A slot took that long, more than planned."""
        for usage in unet.usage:
            if usage.seq == seq:
                usage.ms = ms

    # --- small things ---------------------------------------------------------------------------

    @staticmethod
    def _move(request: Request, stage: Stage) -> None:
        """Change the stage.

        Raises:
            IllegalTransitionError: The table of transitions forbids it.
        """
        if stage not in TRANSITIONS[request.stage]:
            raise IllegalTransitionError(
                f"request {request.request_id}: {request.stage.value} -> {stage.value}"
            )
        request.stage = stage

    @staticmethod
    def _forget_decode(request: Request) -> None:
        request.vae = ""
        request.granted_chunks = request.done_chunks = 0
        request.has_gap = False
