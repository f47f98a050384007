"""When workers measure what their profile lacks, beside requests that run already.

A UNet worker whose profile was made in short is measured together with a VAE worker of its device,
one measurement after another: at once while there is nothing to serve, otherwise between slots, at
most every `PAUSE_S`. Meanwhile nothing else is sent to the device, which `run` tells the dispatch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.scheduler.checks import explain
from services.scheduler.commands import ParkEvent
from services.scheduler.fleet import Fleet
from services.scheduler.measurements import (
    Measured,
    Measurement,
    complete_profile,
    list_measurements,
)
from services.scheduler.outbox import Outbox
from services.scheduler.state import Request, Stage, UnetWorker, VaeWorker
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
class Turn:
    """A measurement under way. step_ms, chunk_ms: answers, None until they are there."""

    number: int
    measurement: Measurement
    vae: str
    overdue_at: float
    step_ms: float | None = None
    chunk_ms: tuple[float, ...] | None = None

    @property
    def is_over(self) -> bool:
        """Whether everybody who was asked has answered."""
        one = self.measurement
        return (not one.rows or self.step_ms is not None) and (
            not one.vae_threads or self.chunk_ms is not None
        )


@dataclass(slots=True, kw_only=True)
class Course:
    """All measurements of one UNet worker.

    not_before: of the next one, whatever happens. due_at: of the next one while there is something
    to serve. holds_since: since when nothing new is sent so that the device comes to rest.
    """

    todo: deque[Measurement]
    found: dict[Measurement, Measured] = field(default_factory=dict)
    turn: Turn | None = None
    not_before: float = 0.0
    due_at: float = 0.0
    holds_since: float | None = None
    num_unanswered: int = 0


class Calibration:
    """It shares the core's state and changes none of it but through the fleet.

    Args:
        requests, unets, vaes: The core's own.
        fleet: Takes the profiles that come of it.
        outbox: Where the messages go.
        is_wanted: Whether the policy makes use of it; else nothing is ever measured.
    """

    def __init__(
        self,
        requests: Mapping[str, Request],
        unets: Mapping[str, UnetWorker],
        vaes: Mapping[str, VaeWorker],
        *,
        fleet: Fleet,
        outbox: Outbox,
        is_wanted: bool,
    ) -> None:
        self._requests = requests
        self._unets = unets
        self._vaes = vaes
        self._fleet = fleet
        self._outbox = outbox
        self._is_wanted = is_wanted
        self._courses: dict[str, Course] = {}
        self._given_up: set[str] = set()
        self._last_number = 0

    def run(self, now: float) -> frozenset[str]:
        """Begin and end what is due; the device groups to which nothing else may be sent."""
        if not self._is_wanted:
            return frozenset()
        for name in [one for one in self._courses if one not in self._unets]:
            del self._courses[name]
        taken: set[str] = set()
        resting = set()
        for name, unet in self._unets.items():
            group = unet.info.device_group
            if group in taken or not self._needs_it(name, unet):
                continue
            taken.add(group)
            try:
                if self._advance(name, unet, now):
                    resting.add(group)
            except Exception as error:  # noqa: BLE001  whatever was measured, its profile will do
                self._given_up.add(name)
                self._courses.pop(name, None)
                registered = messages.WorkerRegistered(worker=unet.info)
                self._outbox.add(ParkEvent(event=registered, reason=explain(error)))
        return frozenset(resting)

    def note_slot(self, event: messages.SlotMeasured) -> None:
        """The UNet worker's part."""
        course = self._courses.get(event.incarnation)
        if course and course.turn and self._is_of(course.turn, event):
            course.turn.step_ms = event.step_ms

    def note_chunks(self, event: messages.ChunksMeasured) -> None:
        """The VAE worker's part."""
        for course in self._courses.values():
            turn = course.turn
            if turn and turn.vae == event.incarnation and self._is_of(turn, event):
                turn.chunk_ms = event.chunk_ms

    def _is_of(self, turn: Turn, event: messages.SlotMeasured | messages.ChunksMeasured) -> bool:
        return (event.epoch, event.number) == (self._outbox.epoch, turn.number)

    def _needs_it(self, name: str, unet: UnetWorker) -> bool:
        if not unet.is_usable or unet.takes_turns or name in self._given_up:
            return False
        return unet.profile.source == "short" and bool(unet.info.step_ms)

    def _advance(self, name: str, unet: UnetWorker, now: float) -> bool:
        """Whether the device is to be left alone."""
        vae = self._partner(unet)
        course = self._courses.get(name)
        if course is None:
            if vae is None:
                return False
            todo = list_measurements(unet.profile, unet.info, vae.info)
            course = self._courses[name] = Course(todo=deque(todo))
        if course.turn:
            self._end_turn(course, course.turn, now)
            if course.turn:
                return True
        if not course.todo or course.num_unanswered >= MAX_UNANSWERED:
            self._end_course(name, unet, course)
            return False
        if vae is None or not self._may_begin(unet, course, now):
            return False
        if self._is_at_rest(unet.info.device_group):
            self._begin_turn(name, unet, vae, course, now)
        return True

    def _partner(self, unet: UnetWorker) -> VaeWorker | None:
        """A VAE worker of the same model on the same device."""
        wanted = (unet.info.device_group, unet.info.model_id)
        fitting = (
            vae
            for vae in self._vaes.values()
            if (vae.info.device_group, vae.info.model_id) == wanted and vae.is_usable
        )
        return next(fitting, None)

    # --- turns ----------------------------------------------------------------------------------

    def _may_begin(self, unet: UnetWorker, course: Course, now: float) -> bool:
        """Whether the next measurement is due, and the device has not kept it waiting too long."""
        is_serving = any(
            request.batch_key.model == unet.info.model_id for request in self._requests.values()
        )
        if now < course.not_before or (is_serving and now < course.due_at):
            return False
        if course.holds_since is None:
            course.holds_since = now
        if now - course.holds_since > MAX_HOLD_S:
            self._pause(course, now)
            return False
        return True

    def _is_at_rest(self, group: str) -> bool:
        """Whether nothing runs or is on its way on the device."""
        for name, unet in self._unets.items():
            if unet.info.device_group == group and (
                unet.slots
                or any(
                    request.stage is Stage.ENCODING and request.unet == name
                    for request in self._requests.values()
                )
            ):
                return False
        return not any(
            self._requests[request_id].granted_chunks > self._requests[request_id].done_chunks
            for vae in self._vaes.values()
            if vae.info.device_group == group
            for request_id in vae.decodes
        )

    def _begin_turn(
        self, name: str, unet: UnetWorker, vae: VaeWorker, course: Course, now: float
    ) -> None:
        one = course.todo.popleft()
        self._last_number += 1
        height, _, width = unet.profile.slots[0].key.partition("x")
        if one.rows:
            measure_slot = messages.MeasureSlot(
                epoch=self._outbox.epoch,
                number=self._last_number,
                height=int(height),
                width=int(width),
                rows=one.rows,
                threads=one.unet_threads,
                window_ms=one.window_ms,
            )
            self._outbox.send(name, "control", measure_slot)
        if one.vae_threads:
            measure_chunks = messages.MeasureChunks(
                epoch=self._outbox.epoch,
                number=self._last_number,
                height=int(height),
                width=int(width),
                threads=one.vae_threads,
                window_ms=one.window_ms,
            )
            self._outbox.send(vae.info.incarnation, "control", measure_chunks)
        course.holds_since = None
        course.turn = Turn(
            number=self._last_number,
            measurement=one,
            vae=vae.info.incarnation,
            overdue_at=now + 3 * one.window_ms / 1000 + ANSWER_S,
        )

    def _end_turn(self, course: Course, turn: Turn, now: float) -> None:
        """Note what was found; or take it again where a worker is gone or keeps silent."""
        is_vae_gone = turn.vae not in self._vaes
        if turn.is_over:
            course.found[turn.measurement] = Measured(
                step_ms=turn.step_ms or 0.0, chunk_ms=turn.chunk_ms or ()
            )
            course.due_at = now + PAUSE_S
            course.turn = None
        elif is_vae_gone or now >= turn.overdue_at:
            course.num_unanswered += not is_vae_gone
            course.todo.appendleft(turn.measurement)
            course.turn = None
            self._pause(course, now)

    def _pause(self, course: Course, now: float) -> None:
        """Let others go on, and what may still be measured come to its end."""
        course.holds_since = None
        course.not_before = course.due_at = now + PAUSE_S

    def _end_course(self, name: str, unet: UnetWorker, course: Course) -> None:
        del self._courses[name]
        profile = complete_profile(unet.profile, course.found, made_with=name)
        if profile is None or course.todo:
            self._given_up.add(name)
        else:
            self._fleet.adopt(name, profile)
