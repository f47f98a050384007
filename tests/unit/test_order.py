"""Who is next: a fair share of the service first, priority within it."""

from __future__ import annotations

from scheduler_world import make_request

from services.scheduler.core.state import Request, Stage
from services.scheduler.planning.order import AGEING_S, by_fair_share


def waiting(
    name: str, *, owner: str = "", priority: int = 0, at: float = 0.0, deadline_ms: int = 0
) -> Request:
    asked = make_request(
        name, owner=owner, priority=priority, submitted_at=at, deadline_ms=deadline_ms
    )
    return Request(request=asked, stage=Stage.WAITING)


def order(*requests: Request, now: float = 1.0, in_service: tuple[Request, ...] = ()) -> list[str]:
    return [one.request_id for one in by_fair_share(requests, now, in_service=in_service)]


def test_priority_does_not_count_against_other_owners() -> None:
    loud = [waiting(f"loud{i}", owner="loud", priority=100, at=0.5) for i in range(3)]
    quiet = [waiting(f"quiet{i}", owner="quiet", at=0.1) for i in range(2)]
    assert order(*loud, *quiet) == ["quiet0", "loud0", "quiet1", "loud1", "loud2"]


def test_within_an_owner_priority_goes_first_then_the_deadline_then_age() -> None:
    assert order(
        waiting("old"),
        waiting("new", at=0.5),
        waiting("due", at=0.5, deadline_ms=10_000),
        waiting("first", at=0.5, priority=1),
    ) == ["first", "due", "old", "new"]


def test_what_an_owner_has_in_service_counts() -> None:
    held = (waiting("held", owner="a"),)
    found = order(waiting("a0", owner="a"), waiting("b0", owner="b", at=0.5), in_service=held)
    assert found == ["b0", "a0"]


def test_waiting_is_worth_priority() -> None:
    old, urgent = waiting("old"), waiting("urgent", priority=1, at=2 * AGEING_S)
    assert order(old, urgent, now=2 * AGEING_S) == ["old", "urgent"]
    assert order(old, urgent, now=AGEING_S / 2) == ["urgent", "old"]
