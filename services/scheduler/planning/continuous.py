"""Continuous batching without a plan for the decodes: the two usual designs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.scheduler.core.state import Request
from services.scheduler.devices.profile import SlotKind
from services.scheduler.planning.packing import pack_batches
from services.scheduler.planning.policy import (
    MAX_SLOTS_IN_FLIGHT,
    WAIT,
    DeviceView,
    Grant,
    Plan,
    WithoutThreshold,
    make_rows,
)
from services.scheduler.planning.skipping import skippable_next
from services.scheduler.planning.threads import DEFAULT_THREADS, ThreadSplit


def skippable(view: DeviceView, requests: Sequence[Request]) -> frozenset[str]:
    """Return ids of every row that may skip; none while only one request is there."""
    if len(view.requests) + view.num_waiting <= 1:
        return frozenset()
    return skippable_next(requests, view.unet.profile)


def make_slot(
    view: DeviceView,
    *,
    max_rows: int,
    skips: bool,
    unet_threads: int,
    vae_threads: int,
    chunks: int,
) -> Plan:
    """Return the next slot with those threads on each side; chunks: beside it, 0 for none."""
    may_skip = skippable(view, view.requests) if skips else frozenset()
    batches = pack_batches(
        view.requests, view.unet, view.now, max_rows=max_rows, num_slots=1, may_skip=may_skip
    )
    if not batches:
        return WAIT
    return Plan(
        rows=make_rows(batches[0].requests, may_skip),
        threads=unet_threads,
        kind=SlotKind(unet_threads=unet_threads, vae_threads=vae_threads, chunks=chunks),
    )


def split_threads(view: DeviceView) -> ThreadSplit:
    """Return the best split for a full slot of the worker's usual size."""
    profile = view.unet.profile
    size = view.requests[0].batch_key.size if view.requests else profile.slots[0].key
    return ThreadSplit.best(view.unet.durations, size, view.unet.durations.knee(size))


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuousSerial(WithoutThreshold):
    """A decode has the device to itself and the UNet waits for it."""

    def plan(self, view: DeviceView) -> Plan:
        """Return a decode if one waits and no slot is in flight; no slot while there is one."""
        unfinished = [
            decode for decode in view.decodes if decode.is_assigned and not decode.is_done
        ]
        if unfinished:
            decode = unfinished[0]
            if view.unet.slots or decode.is_running:
                return WAIT
            grant = Grant(
                request_id=decode.request.request_id,
                chunks=decode.remaining,
                threads=split_threads(view).vae_alone,
                is_gap=True,
            )
            return Plan(grants=(grant,))
        if len(view.unet.slots) >= MAX_SLOTS_IN_FLIGHT:
            return WAIT
        return make_slot(
            view,
            max_rows=self.max_rows,
            skips=self.skips,
            unet_threads=split_threads(view).unet_alone,
            vae_threads=0,
            chunks=0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuousParallel(WithoutThreshold):
    """Decodes start whenever they arrive, beside the UNet: the usual design.

    Where the device takes turns, so do they.
    """

    uses_default_threads: bool = False
    """Whether both sides are left at the library's default instead of splitting cores."""

    def plan(self, view: DeviceView) -> Plan:
        """Return every decode at once, and slots that regard them in nothing but the threads."""
        if view.unet.takes_turns:
            return ContinuousSerial(max_rows=self.max_rows, skips=self.skips).plan(view)
        threads = DEFAULT_THREADS if self.uses_default_threads else split_threads(view)
        is_busy = any(request.has_forwards_left for request in view.requests) or view.unet.slots
        vae_threads = threads.vae_beside if is_busy else threads.vae_alone
        grants = tuple(
            Grant(
                request_id=decode.request.request_id, chunks=decode.remaining, threads=vae_threads
            )
            for decode in view.decodes
            if decode.is_assigned and decode.remaining
        )
        if len(view.unet.slots) >= MAX_SLOTS_IN_FLIGHT:
            return Plan(grants=grants)
        beside = [decode for decode in view.decodes if decode.is_assigned and not decode.is_done]
        slot = make_slot(
            view,
            max_rows=self.max_rows,
            skips=self.skips,
            unet_threads=threads.unet_beside if beside else threads.unet_alone,
            vae_threads=vae_threads if beside else 0,
            chunks=beside[0].num_chunks if beside else 0,
        )
        return Plan(rows=slot.rows, threads=slot.threads, kind=slot.kind, grants=grants)
