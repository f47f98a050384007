"""When workers measure what their profile lacks, beside requests that run already.

A UNet worker whose profile was made in short is measured together with a VAE worker of its device,
one measurement after another: at once while there is nothing to serve, otherwise between slots, at
most every `PAUSE_S`. Meanwhile nothing else is sent to the device, which `run` tells the dispatch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from services.scheduler.core.checks import explain
from services.scheduler.core.cluster import Cluster
from services.scheduler.core.commands import ParkEvent
from services.scheduler.core.fleet import Fleet
from services.scheduler.core.outbox import Outbox
from services.scheduler.core.state import Stage, UnetWorker, VaeWorker
from services.scheduler.devices.measurements import (
    Measured,
    Measurement,
    complete_profile,
    list_measurements,
)
from shared import messages

PAUSE_S = 1.2
"""From one measurement to the next while there is something to serve."""

MAX_HOLD_S = 5.0
"""How long slots in flight may take to end once no others are sent; then they go on."""

ANSWER_S = 5.0
"""Beyond its window and what runs over it, an answer takes at most so long."""

MAX_UNANSWERED = 3
"""After so many measurements without an answer a worker's profile stays as it is."""


@dataclass(slots=True, kw_only=True)
class PendingMeasurement:
    """A measurement under way."""

    number: int
    measurement: Measurement
    vae: str
    overdue_at: float
    step_ms: float | None = None
    """The UNet worker's answer, None until it is there."""
    chunk_ms: tuple[float, ...] | None = None
    """The VAE worker's."""

    @property
    def is_over(self) -> bool:
        """Return whether everybody who was asked has answered."""
        asked = self.measurement
        return (not asked.rows or self.step_ms is not None) and (
            not asked.vae_threads or self.chunk_ms is not None
        )


@dataclass(slots=True, kw_only=True)
class CalibrationRun:
    """All measurements of one UNet worker."""

    todo: deque[Measurement]
    found: dict[Measurement, Measured] = field(default_factory=dict)
    pending: PendingMeasurement | None = None
    not_before: float = 0.0
    """Of the next measurement, whatever happens."""
    due_at: float = 0.0
    """Of the next measurement while there is something to serve."""
    holds_since: float | None = None
    """Since when nothing new is sent, so that the device comes to rest."""
    num_unanswered: int = 0


class Calibration:
    """Has workers measured; it changes the cluster through the fleet only.

    Args:
        cluster: The state.
        fleet: Takes the profiles that come of it.
        outbox: Where the messages go.
        is_wanted: Whether the policy makes use of it; else nothing is ever measured.
    """

    def __init__(self, cluster: Cluster, *, fleet: Fleet, outbox: Outbox, is_wanted: bool) -> None:
        self._cluster = cluster
        self._fleet = fleet
        self._outbox = outbox
        self._is_wanted = is_wanted
        self._runs: dict[str, CalibrationRun] = {}
        self._given_up: set[str] = set()
        self._last_number = 0

    def run(self, now: float) -> frozenset[str]:
        """Begin and end what is due; the device groups to which nothing else may be sent."""
        if not self._is_wanted:
            return frozenset()
        for name in [run for run in self._runs if run not in self._cluster.unets]:
            del self._runs[name]
        taken: set[str] = set()
        resting = set()
        for name, unet in self._cluster.unets.items():
            group = unet.info.device_group
            if group in taken or not self._needs_it(name, unet):
                continue
            taken.add(group)
            try:
                if self._advance(name, unet, now):
                    resting.add(group)
            except Exception as error:  # noqa: BLE001  whatever was measured, its profile will do
                self._given_up.add(name)
                self._runs.pop(name, None)
                registered = messages.WorkerRegistered(worker=unet.info)
                self._outbox.add(ParkEvent(event=registered, reason=explain(error)))
        return frozenset(resting)

    def note_slot(self, event: messages.SlotMeasured) -> None:
        """Take the UNet worker's part of a measurement."""
        run = self._runs.get(event.incarnation)
        if run and run.pending and self._is_of(run.pending, event):
            run.pending.step_ms = event.step_ms

    def note_chunks(self, event: messages.ChunksMeasured) -> None:
        """Take the VAE worker's part of a measurement."""
        for run in self._runs.values():
            pending = run.pending
            if pending and pending.vae == event.incarnation and self._is_of(pending, event):
                pending.chunk_ms = event.chunk_ms

    def _is_of(
        self, pending: PendingMeasurement, event: messages.SlotMeasured | messages.ChunksMeasured
    ) -> bool:
        return (event.epoch, event.number) == (self._outbox.epoch, pending.number)

    def _needs_it(self, name: str, unet: UnetWorker) -> bool:
        if not unet.is_usable or unet.takes_turns or name in self._given_up:
            return False
        return unet.profile.source == "short" and bool(unet.info.step_ms)

    def _advance(self, name: str, unet: UnetWorker, now: float) -> bool:
        """Return whether the device is to be left alone."""
        vae = self._partner(unet)
        run = self._runs.get(name)
        if run is None:
            if vae is None:
                return False
            todo = list_measurements(unet.profile, unet.info, vae.info)
            run = self._runs[name] = CalibrationRun(todo=deque(todo))
        if run.pending:
            self._end_measurement(run, run.pending, now)
            if run.pending:
                return True
        if not run.todo or run.num_unanswered >= MAX_UNANSWERED:
            self._end_run(name, unet, run)
            return False
        if vae is None or not self._may_begin(unet, run, now):
            return False
        if self._is_at_rest(unet.info.device_group):
            self._begin_measurement(name, unet, vae, run, now)
        return True

    def _partner(self, unet: UnetWorker) -> VaeWorker | None:
        """Return a VAE worker of the same model on the same device."""
        wanted = (unet.info.device_group, unet.info.model_id)
        fitting = (
            vae
            for vae in self._cluster.vaes.values()
            if (vae.info.device_group, vae.info.model_id) == wanted and vae.is_usable
        )
        return next(fitting, None)

    # --- one measurement ------------------------------------------------------------------------

    def _may_begin(self, unet: UnetWorker, run: CalibrationRun, now: float) -> bool:
        """Return whether the next measurement is due, and the device is not kept too long."""
        is_serving = any(
            request.batch_key.model == unet.info.model_id
            for request in self._cluster.requests.values()
        )
        if now < run.not_before or (is_serving and now < run.due_at):
            return False
        if run.holds_since is None:
            run.holds_since = now
        if now - run.holds_since > MAX_HOLD_S:
            self._pause(run, now)
            return False
        return True

    def _is_at_rest(self, group: str) -> bool:
        """Return whether nothing runs or is on its way on the device."""
        for unet in self._cluster.unets_on(group):
            held = self._cluster.held_by(unet.info.incarnation)
            if unet.slots or any(request.stage is Stage.ENCODING for request in held):
                return False
        decodes = self._cluster.decodes_on(group)
        return not any(request.has_chunks_running for request in decodes)

    def _begin_measurement(
        self, name: str, unet: UnetWorker, vae: VaeWorker, run: CalibrationRun, now: float
    ) -> None:
        wanted = run.todo.popleft()
        self._last_number += 1
        height, _, width = unet.profile.slots[0].key.partition("x")
        if wanted.rows:
            measure_slot = messages.MeasureSlot(
                epoch=self._outbox.epoch,
                number=self._last_number,
                height=int(height),
                width=int(width),
                rows=wanted.rows,
                threads=wanted.unet_threads,
                window_ms=wanted.window_ms,
            )
            self._outbox.send(name, "control", measure_slot)
        if wanted.vae_threads:
            measure_chunks = messages.MeasureChunks(
                epoch=self._outbox.epoch,
                number=self._last_number,
                height=int(height),
                width=int(width),
                threads=wanted.vae_threads,
                window_ms=wanted.window_ms,
            )
            self._outbox.send(vae.info.incarnation, "control", measure_chunks)
        run.holds_since = None
        run.pending = PendingMeasurement(
            number=self._last_number,
            measurement=wanted,
            vae=vae.info.incarnation,
            overdue_at=now + 3 * wanted.window_ms / 1000 + ANSWER_S,
        )

    def _end_measurement(
        self, run: CalibrationRun, pending: PendingMeasurement, now: float
    ) -> None:
        """Note what was found; or take it again where a worker is gone or keeps silent."""
        is_vae_gone = pending.vae not in self._cluster.vaes
        if pending.is_over:
            run.found[pending.measurement] = Measured(
                step_ms=pending.step_ms or 0.0, chunk_ms=pending.chunk_ms or ()
            )
            run.due_at = now + PAUSE_S
            run.pending = None
        elif is_vae_gone or now >= pending.overdue_at:
            run.num_unanswered += not is_vae_gone
            run.todo.appendleft(pending.measurement)
            run.pending = None
            self._pause(run, now)

    def _pause(self, run: CalibrationRun, now: float) -> None:
        """Let others go on, and what may still be measured come to its end."""
        run.holds_since = None
        run.not_before = run.due_at = now + PAUSE_S

    def _end_run(self, name: str, unet: UnetWorker, run: CalibrationRun) -> None:
        del self._runs[name]
        profile = complete_profile(unet.profile, run.found, made_with=name)
        if profile is None or run.todo:
            self._given_up.add(name)
        else:
            self._fleet.adopt(name, profile)
