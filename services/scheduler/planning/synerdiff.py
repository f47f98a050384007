"""The policy this system is named after: plan a window of slots under a moving threshold."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from services.scheduler.core.state import BatchKey, Outlook, Request
from services.scheduler.devices.durations import Durations
from services.scheduler.planning.options import WindowRule
from services.scheduler.planning.planner import Solution, greedy, solve
from services.scheduler.planning.policy import (
    MAX_SLOTS_IN_FLIGHT,
    WAIT,
    Decode,
    DeviceView,
    Grant,
    Plan,
    make_rows,
)
from services.scheduler.planning.problem import Window, make_window
from services.scheduler.planning.threshold import Stretches, Threshold, ThresholdRule

MIN_DECODE_SHARE = 0.1
"""Of the device's time, in the decoder's predicted wait, however high the threshold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SynerDiff:
    """Continuous batching, chunks and skips planned together, with each part switchable."""

    max_rows: int = 0
    """The most rows of a slot; 0 leaves it to the profile."""
    chunking: bool = True
    """Whether decodes may run in parts."""
    skip: bool = True
    """Whether guidance may be skipped."""
    planning: bool = True
    """Whether a window of slots is planned; else each slot takes what it can (`greedy`)."""
    feedback: bool = True
    """Whether the threshold moves with the queues; else it stays at its first value."""
    rule: ThresholdRule = field(default_factory=ThresholdRule)
    window: WindowRule = field(default_factory=WindowRule)
    max_decode_wait_s: float = 3.0
    """An older decode is granted regardless of the threshold."""

    @property
    def admission_factor(self) -> int:
        """Return 2, so that a full slot never waits for a prompt."""
        return 2

    @property
    def plans_overlap(self) -> bool:
        """Return true: every part of it weighs what runs side by side."""
        return True

    def first_threshold(self) -> Threshold:
        """Return where the rule begins."""
        return Threshold(value=self.rule.first_value)

    def adjust(self, view: DeviceView) -> Threshold:
        """Return the threshold after one more slot."""
        stretches = predict_stretches(view)
        if not self.feedback:
            return Threshold(value=view.unet.threshold.value, stretches=stretches)
        return view.unet.threshold.after_slot(self.rule, stretches)

    def plan(self, view: DeviceView) -> Plan:
        """Return more chunks beside slots in flight, then the next gap or slot, if one can be sent.

        Where there is no step to run, every decode gets its chunks.
        """
        if any(decode.request.has_gap and decode.is_running for decode in view.decodes):
            return WAIT
        is_full = len(view.unet.slots) >= MAX_SLOTS_IN_FLIGHT
        if is_full and not any(decode.is_assigned and decode.remaining for decode in view.decodes):
            return WAIT
        window = make_window(view, self._window_rule())
        if window is None:
            chunks = sum(decode.remaining for decode in view.decodes)
            queue = ChunkQueue(view.decodes, view.unet.durations)
            return Plan(grants=queue.grant(chunks, is_gap=view.unet.takes_turns))
        if not window.problem.stages:
            return WAIT
        solution = solve(window.problem) if self.planning else greedy(window.problem)
        return _next_of(view, window, solution, () if is_full else window.requests)

    def _window_rule(self) -> WindowRule:
        return replace(
            self.window,
            max_rows=self.max_rows,
            num_slots=self.window.num_slots if self.planning else 1,
            max_decode_wait_s=self.max_decode_wait_s,
            chunking=self.chunking,
            skip=self.skip,
        )


def _next_of(
    view: DeviceView, window: Window, solution: Solution, requests: Sequence[Request]
) -> Plan:
    """Return what a window's solution says of now.

    requests: of the next slot; none where none can be sent.
    """
    outlook = Outlook(
        theta=view.unet.threshold.value,
        planned_ms=solution.ms - window.in_flight_ms + window.past_ms,
        alone_ms=window.alone_ms,
        is_feasible=solution.is_feasible,
        is_forced=window.is_forced,
    )
    queue = ChunkQueue(window.decodes, view.unet.durations)
    grants = _beside_slots_in_flight(queue, window, solution)
    if not requests:
        return Plan(grants=grants, outlook=outlook)
    gap, slot = solution.options[len(window.in_flight) :][:2]
    in_gap = queue.grant(gap.chunks, is_gap=True)
    if in_gap:
        return Plan(grants=grants + in_gap, outlook=outlook, usage=(gap.ms, 0.0))
    timing = window.timings[slot.chunks, slot.skips]
    beside = queue.grant(slot.chunks, threads=timing.kind.vae_threads, is_bound=True)
    skipped = frozenset(request.request_id for request in islice(window.skippable, slot.skips))
    return Plan(
        rows=make_rows(requests, skipped),
        threads=window.timings[0, slot.skips].kind.unet_threads,
        shape=timing.shape,
        kind=timing.kind,
        grants=grants + beside,
        outlook=outlook,
        usage=(slot.ms, window.first_alone_ms),
    )


def _beside_slots_in_flight(
    queue: ChunkQueue, window: Window, solution: Solution
) -> tuple[Grant, ...]:
    """Return what the solution adds to the slots that were sent already."""
    grants: list[Grant] = []
    for sent, option in zip(window.in_flight, solution.options, strict=False):
        if option.chunks:
            threads = sent.vae_threads[option.chunks]
            added = queue.grant(option.chunks, threads=threads, beside_seq=sent.slot.seq)
            extra_ms = (option.ms - sent.base_ms) / max(len(added), 1)
            grants += [replace(grant, extra_ms=extra_ms) for grant in added]
    return tuple(grants)


class ChunkQueue:
    """Chunks that can be granted, of decodes at a VAE worker, in the order of service.

    Args:
        decodes: In that order.
        durations: They know the threads that a decode takes alone.
    """

    def __init__(self, decodes: Iterable[Decode], durations: Durations) -> None:
        self._decodes = deque(
            decode for decode in decodes if decode.is_assigned and decode.remaining
        )
        self._num_taken = 0
        self._durations = durations

    def grant(
        self,
        chunks: int,
        *,
        threads: int | None = None,
        is_gap: bool = False,
        is_bound: bool = False,
        beside_seq: int = 0,
    ) -> tuple[Grant, ...]:
        """Return grants of the next so many chunks, as far as there are.

        threads: beside a slot; None for the decoder's best alone.
        """
        grants = []
        while chunks and self._decodes:
            decode = self._decodes[0]
            taken = min(decode.remaining - self._num_taken, chunks)
            grants.append(
                Grant(
                    request_id=decode.request.request_id,
                    chunks=taken,
                    threads=self._alone_threads(decode) if threads is None else threads,
                    is_gap=is_gap,
                    is_bound=is_bound,
                    beside_seq=beside_seq,
                )
            )
            chunks -= taken
            self._num_taken += taken
            if self._num_taken == decode.remaining:
                self._decodes.popleft()
                self._num_taken = 0
        return tuple(grants)

    def _alone_threads(self, decode: Decode) -> int:
        timing = self._durations.decode(decode.request.batch_key.size)
        return timing.threads if timing else self._durations.profile.threads


def predict_stretches(view: DeviceView) -> Stretches:
    """Return the predicted wait over own service time of a request that comes to each stage now.

    Ahead of the UNet: who waits for admission or for a place in a slot, at each batch key's own
    knee. Ahead of the decoder: chunks not granted yet, at the share of the device that the
    threshold leaves.
    """
    durations = view.unet.durations
    running: dict[BatchKey, list[Request]] = {}
    for request in view.requests:
        if request.has_forwards_left:
            running.setdefault(request.batch_key, []).append(request)
    unet = 0.0
    for key in {**running, **view.waiting}:
        knee, requests = durations.knee(key.size), running.get(key, ())
        rows = sum(request.rows for request in requests)
        own_rows = rows / len(requests) if requests else 2.0
        unet += (view.waiting.get(key, 0.0) * own_rows + max(rows - knee, 0.0)) / knee
    pending = [decode for decode in view.decodes if not decode.is_coming]
    undone = sum(decode.remaining / decode.num_chunks for decode in pending)
    share = max(1 - view.unet.threshold.value, MIN_DECODE_SHARE) if running else 1.0
    return Stretches(unet=unet, vae=undone / share if undone else 0.0)
