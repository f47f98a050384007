"""What becomes of an event, a request or a worker that can't be taken: the others go on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from services.scheduler.core.blame import BlamedError
from services.scheduler.core.checks import explain
from services.scheduler.core.cluster import Cluster
from services.scheduler.core.commands import ParkEvent
from services.scheduler.core.dispatch import sort_requests, view_device
from services.scheduler.core.endings import Endings
from services.scheduler.core.events import Event, RequestRecovered
from services.scheduler.core.fleet import Fleet
from services.scheduler.core.liveness import Liveness
from services.scheduler.core.outbox import Outbox
from services.scheduler.core.state import Request, UnetWorker
from services.scheduler.planning.policy import DeviceView, Policy
from shared import messages
from shared.errors import ProtocolError

UNPROCESSABLE = "unprocessable"
"""The code of a request that can't be served whatever is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parking:
    """Putting aside, over a cluster."""

    cluster: Cluster
    policy: Policy
    endings: Endings
    fleet: Fleet
    liveness: Liveness
    outbox: Outbox

    def park_event(self, event: Event, error: Exception, now: float) -> None:
        """Put an event aside. Whom it is about begins again or fails, since half may be done."""
        self.outbox.add(ParkEvent(event=event, reason=explain(error)))
        requests = self.cluster.requests
        match event:
            case messages.GenerateImage(request_id=name) if name in requests:
                # An entry that was there already is not what is wrong with the request.
                pass
            case messages.GenerateImage(request_id=name):
                self.outbox.fail(name, code=UNPROCESSABLE, reason=explain(error))
            case RequestRecovered():
                name = event.request.request_id
                if name in requests:
                    self.cluster.remove(requests[name])
                self.outbox.fail(name, code=UNPROCESSABLE, reason=explain(error))
            case messages.WorkerRegistered(worker=worker):
                # What did not get past the door has touched nobody.
                if not isinstance(error, ProtocolError):
                    self.fleet.discard(worker.incarnation)
            case messages.SlotDenoised() | messages.WorkerAnnounced():
                self.liveness.suspect(event.incarnation, "unusable answer", now)
            case _:
                name, attempt = getattr(event, "request_id", ""), getattr(event, "attempt", "")
                if request := self.cluster.find(name, attempt):
                    self.endings.fail(request, code=UNPROCESSABLE, reason=explain(error))

    def park_guilty(self, error: Exception, now: float) -> None:
        """Put aside the request or the worker by which the dispatch has failed.

        Raises:
            Exception: The error itself, where there is nobody to blame.
        """
        subject, cause = None, error
        if isinstance(error, BlamedError):
            subject, cause = error.subject, error.cause
        guilty: Request | UnetWorker | None = subject
        if isinstance(subject, UnetWorker):
            guilty = self._find_guilty(subject, now) or subject
        elif subject is None and self.cluster.requests:
            guilty = next(reversed(self.cluster.requests.values()))
        if isinstance(guilty, Request):
            self.outbox.add(ParkEvent(event=guilty.request, reason=explain(cause)))
            self.endings.fail(guilty, code=UNPROCESSABLE, reason=explain(cause))
        elif isinstance(guilty, UnetWorker):
            registered = messages.WorkerRegistered(worker=guilty.info)
            self.outbox.add(ParkEvent(event=registered, reason=explain(cause)))
            self.fleet.discard(guilty.info.incarnation)
        else:
            raise error

    def _find_guilty(self, unet: UnetWorker, now: float) -> Request | None:
        """Return the request that planning for a worker fails by; None if it holds none.

        One that fails it alone, else one without which it succeeds, else the newest.
        """
        view = view_device(self.cluster, unet, sort_requests(self.cluster), now)
        members = [*view.requests, *(decode.request for decode in view.decodes)]
        members.reverse()
        for suspected in members:
            if not self._can_plan(view, [suspected]):
                return suspected
        for suspected in members:
            if self._can_plan(view, [other for other in members if other is not suspected]):
                return suspected
        return members[0] if members else None

    def _can_plan(self, view: DeviceView, requests: Collection[Request]) -> bool:
        """Return whether there is a plan for these alone."""
        names = {request.request_id for request in requests}
        part = replace(
            view,
            requests=[request for request in view.requests if request.request_id in names],
            decodes=[decode for decode in view.decodes if decode.request.request_id in names],
        )
        try:
            self.policy.plan(part)
        except Exception:  # noqa: BLE001  it is asked for whether there is any
            return False
        return True
