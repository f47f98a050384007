"""A simulated UNet worker: the real one's protocol, the profile's durations."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from services.scheduler.simulation.arrivals import Arrival
from services.scheduler.simulation.device import FORWARD, WAITING, Device
from services.scheduler.simulation.rates import Rates, slot_rates
from services.scheduler.simulation.world import World
from shared import messages
from shared.guidance_skip import SKIP_LEVELS

MEASURED_SKIP_ERROR = 0.3
"""What every request reports of its guidance's error; the real ones differ."""


@dataclass(slots=True, kw_only=True)
class Resident:
    """A request at the worker. last_full: its last step with full guidance."""

    arrival: Arrival
    attempt: str
    step: int = 0
    last_full: int = -1
    num_skipped: int = 0

    @property
    def is_guided(self) -> bool:
        """Return whether a full step takes two rows."""
        return self.arrival.guidance_scale > 1

    @property
    def skip_steps(self) -> int:
        """Return how many steps in a row may be skipped from the next one on."""
        level = SKIP_LEVELS[self.arrival.guidance_skip]
        if level is None or not self.is_guided:
            return 0
        allowed = level.steps_in_gap(self.last_full, self.arrival.num_steps)
        return max(allowed - (self.step - self.last_full) + 1, 0)

    def will_skip(self, row: messages.SlotRow) -> bool:
        """Return whether a row that is to be skipped really is."""
        return row.skip and self.skip_steps > 0

    def advance(self, *, was_skipped: bool) -> None:
        """Note that one step is done."""
        self.num_skipped += was_skipped
        if not was_skipped:
            self.last_full = self.step
        self.step += 1


class SimulatedUnet:
    """One worker.

    Args:
        info: As it registers.
        device: Where it runs.
        world: The rest.
        on_slot: Called when a slot begins or ends, so that chunks beside it may.
    """

    def __init__(
        self,
        info: messages.WorkerInfo,
        device: Device,
        world: World,
        on_slot: Callable[[], None],
    ) -> None:
        self.info = info
        self._device = device
        self._world = world
        self._on_slot = on_slot
        self._slots: deque[messages.DenoiseSlot] = deque()
        self._admissions: deque[messages.AdmitRequest] = deque()
        self._held: dict[str, Resident] = {}

    def receive(self, message: messages.Message) -> None:
        """Take a message of the scheduler's."""
        match message:
            case messages.AdmitRequest():
                self._admissions.append(message)
            case messages.DenoiseSlot():
                self._slots.append(message)
            case messages.ReleaseRequest(request_id=request_id):
                self._held.pop(request_id, None)
            case messages.BeginEpoch(epoch=epoch):
                self._world.tell(
                    messages.WorkerAnnounced(incarnation=self.info.incarnation, epoch=epoch)
                )
        self._begin()

    def _begin(self) -> None:
        """Begin what is next; admissions go before slots."""
        if self._device.is_busy(FORWARD) or self._device.is_busy(WAITING):
            return
        if self._admissions:
            admit = self._admissions.popleft()
            encode_ms = max(self._world.profile.encode_ms, 1e-3)
            rates = Rates(alone_ms=encode_ms, beside_ms=encode_ms)
            self._device.begin(FORWARD, rates, lambda _: self._admitted(admit), threads=1)
        elif self._slots:
            self._begin_slot(self._slots.popleft())

    def _admitted(self, admit: messages.AdmitRequest) -> None:
        arrival = self._world.arrivals[admit.request_id]
        self._held[admit.request_id] = Resident(arrival=arrival, attempt=admit.attempt)
        self._world.tell(
            messages.RequestAdmitted(
                incarnation=self.info.incarnation,
                request_id=admit.request_id,
                attempt=admit.attempt,
                num_forwards=arrival.num_steps,
                is_guided=arrival.guidance_scale > 1,
            )
        )
        self._begin()

    def _begin_slot(self, slot: messages.DenoiseSlot) -> None:
        device, world = self._device, self._world
        device.running_seq = slot.seq
        device.unet_threads = slot.shape.threads_beside or slot.threads
        rows = [row for row in slot.rows if self._is_held(row)]
        if not rows:
            self._end_slot(slot, [], 0.0)
            return
        num_rows = sum(self._num_rows(row) for row in rows)
        size = world.key(rows[0].request_id)
        rates = slot_rates(
            world.durations, size, num_rows, slot=slot, vae_threads=device.vae_threads
        )
        world.log.slot(num_rows)
        parts = {FORWARD: (rates.going_on, device.unet_threads)}
        if rates.waiting:
            parts[WAITING] = (rates.waiting, slot.threads - device.unet_threads)
        left = set(parts)

        def end_part(name: str, duration_ms: float) -> None:
            left.remove(name)
            if not left:
                self._end_slot(slot, rows, duration_ms)

        for name, (part, threads) in parts.items():
            varied = world.vary(part).longer_by(world.slot_overhead_ms)
            device.begin(name, varied, partial(end_part, name), threads=threads)
        self._on_slot()

    def _is_held(self, row: messages.SlotRow) -> bool:
        held = self._held.get(row.request_id)
        return held is not None and (held.attempt, held.step) == (row.attempt, row.step_index)

    def _num_rows(self, row: messages.SlotRow) -> int:
        held = self._held[row.request_id]
        return 1 if held.will_skip(row) or not held.is_guided else 2

    def _end_slot(
        self, slot: messages.DenoiseSlot, ran: Sequence[messages.SlotRow], duration_ms: float
    ) -> None:
        self._device.running_seq = slot.seq + 1
        reports = tuple(self._report(row, has_run=row in ran) for row in slot.rows)
        self._world.tell(
            messages.SlotDenoised(
                incarnation=self.info.incarnation,
                epoch=slot.epoch,
                seq=slot.seq,
                duration_ms=duration_ms,
                rows=reports,
            )
        )
        for report in reports:
            if report.has_run and report.next_step_index < 0:
                self._world.tell(_latents(self.info, report))
        self._begin()
        self._on_slot()

    def _report(self, row: messages.SlotRow, *, has_run: bool) -> messages.RowReport:
        held = self._held.get(row.request_id)
        was_skipped = False
        if held and has_run:
            was_skipped = held.will_skip(row)
            held.advance(was_skipped=was_skipped)
            if held.step == held.arrival.num_steps:
                del self._held[row.request_id]
                self._world.log.denoised(
                    row.request_id, self._world.clock.now, held.num_skipped, held.step
                )
                held = None
        return messages.RowReport(
            request_id=row.request_id,
            attempt=row.attempt,
            has_run=has_run,
            next_step_index=held.step if held else -1,
            was_skipped=was_skipped,
            can_skip=bool(held and held.skip_steps),
            skip_steps=held.skip_steps if held else 0,
            skip_error=MEASURED_SKIP_ERROR if held and held.last_full >= 0 else 0.0,
        )


def _latents(info: messages.WorkerInfo, report: messages.RowReport) -> messages.LatentsFinished:
    handle = messages.TensorHandle(
        kind="shm",
        pool=info.pool,
        owner=info.incarnation,
        host=info.host,
        slot=0,
        generation=1,
        shape=(1,),
        dtype="float32",
    )
    return messages.LatentsFinished(
        incarnation=info.incarnation,
        request_id=report.request_id,
        attempt=report.attempt,
        handle=handle,
    )
