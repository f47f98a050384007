"""What a policy sees and says.

A policy looks at one UNet worker and the decodes on its device, and changes nothing itself. The
workers are the same under every policy; only the `Plan` differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.scheduler.core.state import Outlook, Request, UnetWorker
from services.scheduler.devices.profile import SlotKind
from services.scheduler.planning.threshold import Threshold
from shared.messages import NO_ROOM, SlotRow, SlotShape

MAX_SLOTS_IN_FLIGHT = 2
"""One runs, one is queued behind it, so that the worker never waits for a message.

The queued one is planned while the other runs. What the running one will tell (which rows may skip)
is predicted for it; the worker has the last word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """A decode on the device. num_chunks: of all its chunks. chunk_ms: of one, alone, as profiled.

    is_assigned: whether it is at a VAE worker already, so that chunks can be granted.
    """

    request: Request
    num_chunks: int
    chunk_ms: float = 0.0
    is_assigned: bool = True

    @property
    def remaining(self) -> int:
        """Chunks that are not granted yet."""
        return max(self.num_chunks - self.request.granted_chunks, 0)

    @property
    def is_coming(self) -> bool:
        """Whether its last step is in a slot in flight."""
        return self.request.slots_in_flight > 0

    @property
    def is_done(self) -> bool:
        """Whether all its chunks have run; its image may still be on its way."""
        return self.request.done_chunks >= self.num_chunks

    @property
    def is_running(self) -> bool:
        """Whether chunks are granted that have not run yet."""
        return self.request.granted_chunks > self.request.done_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """What a policy decides on.

    requests: those at `unet`, in any order. decodes: those that are or will be at VAE workers that
    share its device, assigned ones first, each part oldest first, and last those of requests whose
    last step is in flight or was just done. num_waiting: requests that wait for admission, this
    worker's share of them. now: seconds since the Unix epoch.
    """

    unet: UnetWorker
    requests: Sequence[Request]
    decodes: Sequence[Decode]
    num_waiting: float
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """More chunks for one decode.

    is_gap: with the device to itself, after the slots in flight; no slot is sent before they are
    done. Otherwise: beside the slot of the same plan if `is_bound`, beside the slot in flight of
    that number if `beside_seq` names one, at once if neither. extra_ms: by which it makes a slot in
    flight longer.
    """

    request_id: str
    chunks: int
    threads: int
    is_gap: bool = False
    is_bound: bool = False
    beside_seq: int = 0
    extra_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The next slot's rows (none: no slot now) and threads, and grants.

    shape: how the slot leaves room for chunks. kind: the profile's kind of the slot, None where
    none is known. outlook: what is promised, of policies that plan. spends: (ms planned, ms alone)
    of this slot or gap, None for neither.
    """

    rows: tuple[SlotRow, ...] = ()
    threads: int = 0
    shape: SlotShape = NO_ROOM
    kind: SlotKind | None = None
    grants: tuple[Grant, ...] = ()
    outlook: Outlook | None = None
    spends: tuple[float, float] | None = None


WAIT = Plan()
"""Nothing now; the next event asks again."""


class Policy(Protocol):
    """One way to serve.

    admission_factor: resident rows may reach this many knees. plans_overlap: it weighs slots beside
    chunks, so that a profile which knows none is worth measuring them.
    """

    @property
    def admission_factor(self) -> int:
        """See the class."""
        ...

    @property
    def plans_overlap(self) -> bool:
        """See the class."""
        ...

    def first_threshold(self) -> Threshold:
        """Of a worker that has just come."""
        ...

    def adjust(self, view: GroupView) -> Threshold:
        """The worker's threshold after one more slot."""
        ...

    def plan(self, view: GroupView) -> Plan:
        """The next thing to do for this worker; an empty plan when there is nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutThreshold:
    """The part of a policy that has no threshold. max_rows: 0 leaves it to the profile's knee.

    skips: let every row skip its guidance that may, as soon as more than one request is there.
    """

    max_rows: int = 0
    skips: bool = False

    @property
    def admission_factor(self) -> int:
        """So that a full slot never waits for a prompt."""
        return 2

    @property
    def plans_overlap(self) -> bool:
        """What runs side by side is not weighed."""
        return False

    def first_threshold(self) -> Threshold:
        """One that nobody asks for."""
        return Threshold(value=1.0)

    def adjust(self, view: GroupView) -> Threshold:
        """The same for ever."""
        return view.unet.threshold


def make_rows(requests: Sequence[Request], skipped: frozenset[str]) -> tuple[SlotRow, ...]:
    """The slot's rows, the named ones with their guidance skipped."""
    return tuple(
        SlotRow(
            request_id=request.request_id,
            attempt=request.attempt,
            step_index=request.next_step,
            skip=request.request_id in skipped,
        )
        for request in requests
    )
