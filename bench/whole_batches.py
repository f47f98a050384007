"""Static and dynamic batching, with their textbook limits.

A batch is of one shape, one number of steps and one kind of guidance. It is denoised from its first
step to its last, nobody joins and nobody leaves, then its images are decoded, then comes the next.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.core.state import BatchKey, Request, Stage
from services.scheduler.devices.profile import SlotKind
from services.scheduler.planning.continuous import skippable, split_threads
from services.scheduler.planning.order import by_fair_share
from services.scheduler.planning.packing import MIN_ROWS
from services.scheduler.planning.policy import (
    MAX_SLOTS_IN_FLIGHT,
    WAIT,
    DeviceView,
    Grant,
    Plan,
    WithoutThreshold,
    make_rows,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeBatches(WithoutThreshold):
    """One batch after the other, each from its first step to its last decode."""

    max_wait_s: float
    """A batch that is not full starts once its oldest request has waited so long."""

    @property
    def admission_factor(self) -> int:
        """Return 4: enough residents to find equals among them."""
        return 4

    def plan(self, view: DeviceView) -> Plan:
        """Return the batch under way, or its decodes, or the start of the next."""
        unfinished = [decode for decode in view.decodes if not decode.is_done]
        started = [
            request
            for request in view.requests
            if request.stage is Stage.DENOISING and request.next_step > 0
        ]
        if len(view.unet.slots) >= MAX_SLOTS_IN_FLIGHT:
            return WAIT
        if started:
            lasting = [request for request in started if request.has_forwards_left]
            return self._slot(view, lasting) if lasting else WAIT
        if unfinished:
            threads = split_threads(view).vae_alone
            return Plan(
                grants=tuple(
                    Grant(
                        request_id=decode.request.request_id,
                        chunks=decode.remaining,
                        threads=threads,
                        is_gap=True,
                    )
                    for decode in unfinished
                    if decode.is_assigned and decode.remaining
                )
            )
        batch = self._next_batch(view)
        return self._slot(view, batch) if batch else WAIT

    def _slot(self, view: DeviceView, requests: list[Request]) -> Plan:
        """Return one step of one shape; after a restart the started ones may be several."""
        ordered = sorted(requests, key=lambda request: (request.next_step, request.request_id))
        first = ordered[0]
        limit = self._limit(view, first)
        same: list[Request] = []
        for request in ordered:
            rows = sum(other.rows for other in same) + request.rows
            if request.batch_key == first.batch_key and rows <= limit:
                same.append(request)
        threads = split_threads(view).unet_alone
        skipped = skippable(view, tuple(same)) if self.skips else frozenset()
        return Plan(
            rows=make_rows(same, skipped),
            threads=threads,
            kind=SlotKind(unet_threads=threads),
        )

    def _next_batch(self, view: DeviceView) -> list[Request]:
        groups: dict[tuple[BatchKey, int, bool], list[Request]] = {}
        for request in by_fair_share(view.requests, view.now):
            if request.has_forwards_left:
                kind = (request.batch_key, request.num_forwards, request.is_guided)
                groups.setdefault(kind, []).append(request)
        for group in groups.values():
            size = self._limit(view, group[0]) // group[0].rows
            waited_s = view.now - group[0].request.submitted_at
            if len(group) >= size or waited_s >= self.max_wait_s:
                return group[:size]
        return []

    def _limit(self, view: DeviceView, request: Request) -> int:
        return max(MIN_ROWS, self.max_rows or view.unet.profile.knee(request.batch_key.size))


def static_batching(*, max_rows: int, skips: bool) -> WholeBatches:
    """Return full batches; the wait only serves a last one that never fills."""
    return WholeBatches(max_rows=max_rows, skips=skips, max_wait_s=5.0)


def dynamic_batching(*, max_rows: int, skips: bool) -> WholeBatches:
    """Return batches of whatever is there when the device is free."""
    return WholeBatches(max_rows=max_rows, skips=skips, max_wait_s=0.0)
