"""What a policy sees and says.

A policy looks at one UNet worker and the decodes on its device, and changes nothing itself. The
workers are the same under every policy; only the `Plan` differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.scheduler.core.state import BatchKey, Outlook, Request, UnetWorker
from services.scheduler.devices.profile import SlotKind
from services.scheduler.planning.threshold import Threshold
from shared.messages import NO_ROOM, SlotRow, SlotShape

MAX_SLOTS_IN_FLIGHT = 2
"""One runs, one is queued behind it, so that the worker never waits for a message.

The queued one is planned while the other runs. What the running one will tell (which rows may skip)
is predicted for it; the worker has the last word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """A decode on the device."""

    request: Request
    num_chunks: int
    """Of all of it."""
    chunk_ms: float = 0.0
    """Of one chunk, alone, as profiled."""
    is_assigned: bool = True
    """Whether it is at a VAE worker already, so that chunks can be granted."""

    @property
    def remaining(self) -> int:
        """Return the number of chunks that are not granted yet."""
        return max(self.num_chunks - self.request.granted_chunks, 0)

    @property
    def is_coming(self) -> bool:
        """Return whether its last step is in a slot in flight."""
        return self.request.slots_in_flight > 0

    @property
    def is_done(self) -> bool:
        """Return whether all its chunks have run; its image may still be on its way."""
        return self.request.done_chunks >= self.num_chunks

    @property
    def is_running(self) -> bool:
        """Return whether chunks are granted that have not run yet."""
        return self.request.has_chunks_running


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """What a policy decides on: a UNet worker, and the decodes on its device."""

    unet: UnetWorker
    requests: Sequence[Request]
    """Those at the worker, in any order."""
    decodes: Sequence[Decode]
    """Those at VAE workers of the device, or to come there: assigned ones first, each part oldest
    first, and last those of requests whose last step is in flight or was just done."""
    waiting: Mapping[BatchKey, float]
    """Requests that wait for admission, this worker's share of them, by batch key."""
    now: float
    """Seconds since the Unix epoch."""

    @property
    def num_waiting(self) -> float:
        """Return this worker's share of all that wait for admission."""
        return sum(self.waiting.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """More chunks for one decode; at once, where nothing below says otherwise."""

    request_id: str
    chunks: int
    threads: int
    is_gap: bool = False
    """Whether they have the device to themselves, after the slots in flight: no slot is sent
    before they are done."""
    is_bound: bool = False
    """Whether they run beside the slot of the same plan."""
    beside_seq: int = 0
    """The number of the slot in flight that they run beside."""
    extra_ms: float = 0.0
    """By which they make that slot longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The next slot and grants."""

    rows: tuple[SlotRow, ...] = ()
    """Of the slot; none for no slot now."""
    threads: int = 0
    """Of the slot."""
    shape: SlotShape = NO_ROOM
    """How the slot leaves room for chunks."""
    kind: SlotKind | None = None
    """The profile's kind of the slot, None where none is known."""
    grants: tuple[Grant, ...] = ()
    outlook: Outlook | None = None
    """What is promised, of policies that plan."""
    usage: tuple[float, float] | None = None
    """(ms planned, ms alone) of this slot or gap, None for neither."""


WAIT = Plan()
"""Nothing now; the next event asks again."""


class Policy(Protocol):
    """One way to serve."""

    @property
    def admission_factor(self) -> int:
        """Return how many knees the rows at a worker may reach."""
        ...

    @property
    def plans_overlap(self) -> bool:
        """Return whether it weighs slots beside chunks, so that they are worth measuring."""
        ...

    def first_threshold(self) -> Threshold:
        """Return that of a worker that has just come."""
        ...

    def adjust(self, view: DeviceView) -> Threshold:
        """Return the worker's threshold after one more slot."""
        ...

    def plan(self, view: DeviceView) -> Plan:
        """Return the next thing to do for this worker; an empty plan when there is nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutThreshold:
    """The part of a policy that has no threshold."""

    max_rows: int = 0
    """The most rows of a slot; 0 leaves it to the profile's knee."""
    skips: bool = False
    """Whether every row skips its guidance that may, as soon as there is more than one request."""

    @property
    def admission_factor(self) -> int:
        """Return 2, so that a full slot never waits for a prompt."""
        return 2

    @property
    def plans_overlap(self) -> bool:
        """Return false: what runs side by side is not weighed."""
        return False

    def first_threshold(self) -> Threshold:
        """Return one that nobody asks for."""
        return Threshold(value=1.0)

    def adjust(self, view: DeviceView) -> Threshold:
        """Return the same for ever."""
        return view.unet.threshold


def make_rows(requests: Sequence[Request], skipped: frozenset[str]) -> tuple[SlotRow, ...]:
    """Return the slot's rows, the named ones with their guidance skipped."""
    return tuple(
        SlotRow(
            request_id=request.request_id,
            attempt=request.attempt,
            step_index=request.next_step,
            skip=request.request_id in skipped,
        )
        for request in requests
    )
