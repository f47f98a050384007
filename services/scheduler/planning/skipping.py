"""Whose guidance may be skipped in the next slots, within each request's fidelity budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor

from services.scheduler.core.state import Request
from services.scheduler.devices.profile import Profile, SkipLevel
from shared.guidance_skip import SKIP_LEVELS


def skip_credits(request: Request, profile: Profile) -> int:
    """Return how many more steps of a request its fidelity budget lets be skipped.

    A level's `rows_saved` is of all rows, of which a skipped step saves one of two.
    """
    level: SkipLevel | None = profile.skip_levels.get(request.request.parameters.guidance_skip)
    if level is None or not request.is_guided:
        return 0
    allowed = floor(2 * level.rows_saved * request.num_forwards + 0.5)
    asked = request.next_step - max(request.done_step, request.last_full + 1)
    return max(allowed - request.num_skipped - asked, 0)


def may_skip_next(request: Request) -> bool:
    """Return whether the next step not in flight may be skipped, as far as is known here.

    The worker has the last word. Behind a full step in flight it is not known yet whether the
    request's own error allows it; how far apart the level's full steps lie is.
    """
    if request.last_full < request.done_step:
        return request.next_step - request.done_step < request.skip_steps
    parameters = request.request.parameters
    level = SKIP_LEVELS.get(parameters.guidance_skip)
    if level is None or request.num_forwards != parameters.num_inference_steps:
        return False
    distance = request.next_step - request.last_full
    return 0 < distance <= level.steps_in_gap(request.last_full, request.num_forwards)


def skippable_next(requests: Iterable[Request], profile: Profile) -> frozenset[str]:
    """Return the ids of requests whose next step may be skipped."""
    return frozenset(
        request.request_id
        for request in requests
        if may_skip_next(request) and skip_credits(request, profile)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Skippable:
    """A request whose guidance may be skipped."""

    request: Request
    budget: int
    """In steps."""
    price: float
    """Of one skip, over the time that it saves."""
    is_next: bool
    """Whether it may skip in the next slot, too."""


def find_skippable(
    requests: Iterable[Request], profile: Profile, *, base_price: float
) -> list[Skippable]:
    """Return those of the requests that may skip now or later, cheapest first.

    The price rises with the error last measured and with the share of the budget already spent.
    """
    found = []
    for request in requests:
        is_next = may_skip_next(request)
        if not is_next and not request.num_skipped:
            continue
        budget = skip_credits(request, profile)
        if budget:
            spent = request.num_skipped / (request.num_skipped + budget)
            price = base_price * (0.5 + 0.5 * spent + min(request.skip_error, 1.0))
            found.append(Skippable(request=request, budget=budget, price=price, is_next=is_next))
    found.sort(key=lambda skippable: (skippable.price, skippable.request.request_id))
    return found


def skippable_in(
    requests: Sequence[Request], index: int, skippable: Sequence[Skippable]
) -> list[Skippable]:
    """Return who of the window's slot `index` may skip there, cheapest first.

    Later slots assume that who may skip now, or did before, may skip then, as far as the budget
    reaches.
    """
    members = {request.request_id for request in requests}
    return [
        candidate
        for candidate in skippable
        if candidate.budget > index
        and (candidate.is_next or index)
        and candidate.request.request_id in members
    ]
