"""Whether an order is accepted: by when its pictures would come, not by how many are open.

Pure: what the scheduler says of its backlog and what was accepted since in, a decision out. A
model's workers are taken as one server that does what is ahead of an order first; its work comes
from the rates that the scheduler measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.gateway.order import ImageOrder
from shared.errors import OverloadedError
from shared.messages import ImageParameters, ModelInfo

ANSWER_FRACTION = 0.8
"""Of the time-out of a waiting client, by when its pictures have to be predicted."""
MIN_RETRY_S = 0.1
_TWO_FORWARDS = frozenset(
    {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
)
"""Samplers whose steps, but for the last, take two forwards of the UNet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a model's workers had ahead of them when the scheduler wrote it, and how fast they are.

    All are wall milliseconds of the workers together.
    """

    backlog_ms: float
    """Until everything that was accepted is done."""
    row_ms: float
    """That one more row's forward adds, at the model's default size."""
    decode_ms: float
    """That one more decode adds, at that size."""
    overhead_ms: float
    """That one more request adds beside these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacities:
    """What the scheduler said of its models at one instant, on this process's monotonic clock."""

    by_model: Mapping[str, Capacity] = field(default_factory=dict)
    """Those whose speed it knows."""
    written_at: float = float("-inf")


def read_capacities(value: object) -> dict[str, Capacity]:
    """Return the capacities in a scheduler's status, by model; what makes no sense is left out."""
    if not isinstance(value, Mapping):
        return {}
    found = {str(model_id): _read_capacity(entry) for model_id, entry in value.items()}
    return {model_id: capacity for model_id, capacity in found.items() if capacity}


def _read_capacity(entry: Any) -> Capacity | None:
    names = ("backlog_ms", "row_ms", "decode_ms", "overhead_ms")
    try:
        numbers = {name: float(entry.get(name, 0.0)) for name in names}
    except (AttributeError, TypeError, ValueError):
        return None
    is_sound = all(math.isfinite(number) and number >= 0 for number in numbers.values())
    return Capacity(**numbers) if is_sound and numbers["row_ms"] > 0 else None


def order_work_s(order: ImageOrder, capacity: Capacity) -> float:
    """Return the seconds that an order adds, at most: some of its rows may be skipped."""
    return sum(_image_work_ms(image, order.model, capacity) for image in order.images) / 1000


def _image_work_ms(image: ImageParameters, model: ModelInfo, capacity: Capacity) -> float:
    rows = 2 if image.guidance_scale > 1 else 1
    forwards = image.num_inference_steps * (2 if image.sampler in _TWO_FORWARDS else 1)
    area = image.height * image.width / (model.default_height * model.default_width)
    work_ms = forwards * rows * capacity.row_ms + capacity.decode_ms
    return work_ms * area + capacity.overhead_ms


@dataclass(slots=True, kw_only=True, eq=False)
class Acceptance:
    """Work that this gateway has let in. Instants are on its monotonic clock."""

    model_id: str
    work_s: float
    accepted_at: float
    is_pending: bool = True
    """The store has not answered yet, so the scheduler can't know of it."""


@dataclass(slots=True)
class Ledger:
    """What this gateway has let in and the scheduler's latest status does not show yet."""

    _entries: list[Acceptance] = field(default_factory=list)

    def add(self, model_id: str, work_s: float, now: float) -> Acceptance:
        """Enter work before it is sent to the store, so that others see it at once."""
        entry = Acceptance(model_id=model_id, work_s=work_s, accepted_at=now)
        self._entries.append(entry)
        return entry

    def confirm(self, entry: Acceptance, now: float) -> None:
        """Take note that the store has it: a status of later than that shows it."""
        entry.is_pending = False
        entry.accepted_at = now

    def withdraw(self, entry: Acceptance) -> None:
        """Take back what the store has not accepted."""
        if entry in self._entries:
            self._entries.remove(entry)

    def since(self, model_id: str, written_at: float) -> list[Acceptance]:
        """Return a model's work that a status of this instant lacks, and forget what it shows."""
        self._entries = [
            entry for entry in self._entries if entry.is_pending or entry.accepted_at > written_at
        ]
        return [entry for entry in self._entries if entry.model_id == model_id]


def wait_s(
    capacity: Capacity, written_at: float, accepted: Iterable[Acceptance], now: float
) -> float:
    """Return the seconds until everything ahead is done: those of the status, then `accepted`."""
    done_at = written_at + capacity.backlog_ms / 1000
    for entry in sorted(accepted, key=lambda entry: entry.accepted_at):
        done_at = max(done_at, entry.accepted_at) + entry.work_s
    return max(0.0, done_at - now)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitLimits:
    """How long pictures may take to come, in seconds."""

    max_wait_s: float
    """Until the start of an order that names no deadline."""
    timeout_s: float
    """After which a waiting client is answered with 504."""


def check_admission(*, start_s: float, work_s: float, deadline_ms: int, limits: WaitLimits) -> None:
    """Let an order in, whole, or refuse it.

    With nothing ahead it is let in whatever it takes: nobody else could be served instead, and
    whether a deadline can be kept at all is the scheduler's to say.

    Args:
        start_s: The time until what is ahead of it is done.
        work_s: What all its pictures take then.
        deadline_ms: As asked for; 0 for none.
        limits: What holds for everybody.

    Raises:
        OverloadedError: It would come too late; says when it would be let in.
    """
    answer_s = ANSWER_FRACTION * limits.timeout_s
    if deadline_ms:
        allowed_s = min(deadline_ms / 1000, answer_s)
        excess_s = start_s + work_s - allowed_s
        limit = f"deadline_ms is {deadline_ms}"
    else:
        excess_s = max(start_s - limits.max_wait_s, start_s + work_s - answer_s)
        limit = f"a request may wait {limits.max_wait_s:g} s"
    if excess_s > 0 and start_s > 0:
        raise OverloadedError(
            f"{start_s:.1f} s of work are ahead of this one, which would take {work_s:.1f} s, "
            f"and {limit}.",
            retry_after_s=max(MIN_RETRY_S, min(excess_s, start_s)),
        )
