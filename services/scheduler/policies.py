"""Policies: which rows run in the next slot, which decode chunks may start, on how many threads.

A policy looks at one UNet worker and the decodes on its device, and changes nothing itself. The
workers are the same under every policy; only the `Plan` differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.scheduler.state import Request, UnetWorker
from shared.messages import SlotRow

MAX_SLOTS_IN_FLIGHT = 2
"""One runs, one is queued behind it, so that the worker never waits for a message."""

AGEING_S = 30.0
"""Waiting this long is worth one step of priority, so that nothing waits for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """A decode on the device. num_chunks: of all; granted, done: how many so far."""

    request: Request
    num_chunks: int

    @property
    def is_granted(self) -> bool:
        """Whether all its chunks may run."""
        return self.request.granted_chunks >= self.num_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """What a policy decides on.

    requests: those at `unet`, in any order. decodes: those at VAE workers that share its device,
    oldest first. now: seconds since the Unix epoch.
    """

    unet: UnetWorker
    requests: Sequence[Request]
    decodes: Sequence[Decode]
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """More chunks for one decode."""

    request_id: str
    chunks: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The next slot's rows (none: no slot now), its kind and threads, and grants."""

    rows: tuple[SlotRow, ...] = ()
    kind: str = "alone"
    threads: int = 0
    grants: tuple[Grant, ...] = ()


class Policy(Protocol):
    """One way to serve."""

    def plan(self, view: GroupView) -> Plan:
        """The next thing to do for this worker; an empty plan when there is nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadSplit:
    """CPU threads of each side, alone and beside each other; 0 leaves the library's default."""

    unet_alone: int
    unet_beside: int
    vae_alone: int
    vae_beside: int

    @classmethod
    def of(cls, threads: int) -> ThreadSplit:
        """A quarter of the cores, at least one, for decodes beside a slot."""
        beside = max(1, threads // 4)
        return cls(
            unet_alone=threads,
            unet_beside=max(1, threads - beside),
            vae_alone=threads,
            vae_beside=beside,
        )


DEFAULT_THREADS = ThreadSplit(unet_alone=0, unet_beside=0, vae_alone=0, vae_beside=0)
"""What most people run: each process with the library's default, as many threads as cores."""


def by_urgency(requests: Iterable[Request], now: float) -> list[Request]:
    """Oldest first within priority, where waiting raises the priority; ties by id."""
    return sorted(
        requests,
        key=lambda request: (
            -(request.request.priority + (now - request.request.submitted_at) / AGEING_S),
            request.request_id,
        ),
    )


def pack_rows(view: GroupView, max_rows: int) -> tuple[SlotRow, ...]:
    """Rows for the next slot: the batch key whose turn it is, filled to the knee, oldest first.

    The batch key that has waited longest (in slots) goes first, so with K keys each has a slot at
    least every K slots.
    """
    candidates = [request for request in view.requests if request.has_forwards_left]
    if not candidates:
        return ()
    turns = view.unet.turns
    key = min(
        (request.batch_key for request in candidates), key=lambda key: (turns.get(key, -1), key)
    )
    limit = max(2, max_rows or view.unet.profile.knee)
    rows: list[SlotRow] = []
    used = 0
    for request in by_urgency((c for c in candidates if c.batch_key == key), view.now):
        if used + request.rows > limit:
            continue
        used += request.rows
        rows.append(
            SlotRow(
                request_id=request.request_id,
                attempt=request.attempt,
                step_index=request.next_step,
            )
        )
    return tuple(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuousSerial:
    """Continuous batching; a decode has the device to itself and the UNet waits for it."""

    max_rows: int = 0

    def plan(self, view: GroupView) -> Plan:
        """A decode if one waits and no slot is in flight; no slot while one waits or runs."""
        threads = ThreadSplit.of(view.unet.info.threads)
        if view.decodes:
            decode = view.decodes[0]
            if view.unet.slots or decode.request.granted_chunks:
                return Plan()
            grant = Grant(
                request_id=decode.request.request_id,
                chunks=decode.num_chunks,
                threads=threads.vae_alone,
            )
            return Plan(grants=(grant,))
        if len(view.unet.slots) >= MAX_SLOTS_IN_FLIGHT:
            return Plan()
        return Plan(rows=pack_rows(view, self.max_rows), threads=threads.unet_alone)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuousParallel:
    """Continuous batching with decodes starting whenever they arrive: the usual design.

    uses_default_threads: leave both sides at the library's default instead of splitting cores.
    """

    max_rows: int = 0
    uses_default_threads: bool = False

    def plan(self, view: GroupView) -> Plan:
        """Every decode at once, and slots without regard to them but for the thread split."""
        threads = (
            DEFAULT_THREADS if self.uses_default_threads else ThreadSplit.of(view.unet.info.threads)
        )
        is_busy = any(request.has_forwards_left for request in view.requests) or view.unet.slots
        grants = tuple(
            Grant(
                request_id=decode.request.request_id,
                chunks=decode.num_chunks,
                threads=threads.vae_beside if is_busy else threads.vae_alone,
            )
            for decode in view.decodes
            if not decode.is_granted
        )
        if len(view.unet.slots) >= MAX_SLOTS_IN_FLIGHT:
            return Plan(grants=grants)
        is_beside = bool(view.decodes)
        return Plan(
            rows=pack_rows(view, self.max_rows),
            kind="beside" if is_beside else "alone",
            threads=threads.unet_beside if is_beside else threads.unet_alone,
            grants=grants,
        )


def make_policy(name: str, *, max_rows: int) -> Policy:
    """The policy of that name, as in the settings.

    Raises:
        KeyError: There is none.
    """
    policies: dict[str, Policy] = {
        "continuous-serial": ContinuousSerial(max_rows=max_rows),
        "continuous-parallel": ContinuousParallel(max_rows=max_rows),
    }
    return policies[name]
