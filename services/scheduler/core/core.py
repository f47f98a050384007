"""The scheduler's pure core: events in, commands out, the clock passed in.

First every event's fact is settled (`facts`), then one `dispatch` does what follows: it admits
waiting requests, hands finished latents to VAE workers, and asks the policy for slots and grants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.scheduler.core.assignments import Assignments
from services.scheduler.core.calibration import Calibration
from services.scheduler.core.capacity import Capacity, CapacityMeter
from services.scheduler.core.checks import check
from services.scheduler.core.cluster import Cluster
from services.scheduler.core.commands import Command
from services.scheduler.core.dispatch import Dispatch
from services.scheduler.core.endings import Endings
from services.scheduler.core.events import Event
from services.scheduler.core.facts import Facts
from services.scheduler.core.fleet import Fleet
from services.scheduler.core.liveness import Liveness, Patience
from services.scheduler.core.outbox import Outbox
from services.scheduler.core.parking import Parking
from services.scheduler.core.state import Request, Stage, UnetWorker, VaeWorker
from services.scheduler.devices.profile import Profile
from services.scheduler.planning.policy import Policy


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
        cluster, outbox = Cluster(epoch, settings.profiles), Outbox(epoch)
        endings = Endings(cluster=cluster, outbox=outbox, max_attempts=settings.max_attempts)
        fleet = Fleet(cluster=cluster, policy=policy, endings=endings, outbox=outbox)
        liveness = Liveness(
            cluster=cluster, patience=settings.patience, endings=endings, outbox=outbox
        )
        assignments = Assignments(cluster=cluster, policy=policy, outbox=outbox)
        self._cluster = cluster
        self._outbox = outbox
        self._endings = endings
        self._assignments = assignments
        self._dispatch = Dispatch(
            cluster=cluster, policy=policy, assignments=assignments, outbox=outbox
        )
        self._capacity = CapacityMeter(cluster, now=now)
        self._calibration = Calibration(
            cluster, fleet=fleet, outbox=outbox, is_wanted=policy.plans_overlap
        )
        self._facts = Facts(
            cluster=cluster,
            assignments=assignments,
            dispatch=self._dispatch,
            endings=endings,
            fleet=fleet,
            liveness=liveness,
            capacity=self._capacity,
            calibration=self._calibration,
            outbox=outbox,
        )
        self._parking = Parking(
            cluster=cluster,
            policy=policy,
            endings=endings,
            fleet=fleet,
            liveness=liveness,
            outbox=outbox,
        )
        self._recovers_until = now + settings.recovery_s
        self._is_recovering = True

    def on_event(self, event: Event, now: float) -> list[Command]:
        """Return what is to be done about an event, in order."""
        return self.on_events([event], now)

    def on_events(self, events: Sequence[Event], now: float) -> list[Command]:
        """Return the same for events that have come together: all facts first, then one plan."""
        for event in events:
            self._facts.note_answer(event, now)
            try:
                check(event)
                self._facts.settle(event, now)
            except Exception as error:  # noqa: BLE001  whatever it holds, the others go on
                self._parking.park_event(event, error, now)
            if self._is_recovering:
                self._end_recovery_when_due(now)
        if not self._is_recovering:
            self._dispatch_all(now)
        return self._outbox.take()

    # --- what is shown --------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Return the epoch's number."""
        return self._cluster.epoch

    @property
    def requests(self) -> Mapping[str, Request]:
        """Return the open requests by id."""
        return self._cluster.requests

    @property
    def unets(self) -> Mapping[str, UnetWorker]:
        """Return the UNet workers by incarnation."""
        return self._cluster.unets

    @property
    def vaes(self) -> Mapping[str, VaeWorker]:
        """Return the VAE workers by incarnation."""
        return self._cluster.vaes

    def capacity(self) -> dict[str, Capacity]:
        """Return what is ahead of each model's workers, and what more would add."""
        return self._capacity.read()

    def count_stages(self) -> Counter[str]:
        """Return the number of open requests by stage."""
        return Counter(request.stage.value for request in self.requests.values())

    def queue_order(self, now: float) -> list[str]:
        """Return the ids of the waiting requests, the next to be admitted first."""
        return [request.request_id for request in self._assignments.waiting(now)]

    # --- what follows ---------------------------------------------------------------------------

    def _dispatch_all(self, now: float) -> None:
        """Do what follows from the state; without those of whom nothing can follow.

        Each that makes it raise is out, so it comes to an end.
        """
        while True:
            try:
                self._dispatch.run(now, resting=self._calibration.run(now))
            except Exception as error:  # noqa: BLE001  one request must not stop all others
                self._parking.park_guilty(error, now)
            else:
                return

    def _end_recovery_when_due(self, now: float) -> None:
        """Begin to dispatch once every worker has announced, or none will any more."""
        recovering = [r for r in self.requests.values() if r.stage is Stage.RECOVERING]
        is_settled = not recovering or (
            bool(self.unets) and all(unet.is_announced for unet in self.unets.values())
        )
        if now < self._recovers_until and not is_settled:
            return
        self._is_recovering = False
        for request in recovering:
            if request.latents:
                self._cluster.have_latents(request, request.latents, now)
            elif request.done_step:
                self._cluster.hand_back(request, request.done_step)
            else:
                self._endings.restart(request, "not held by any worker")
