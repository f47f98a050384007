"""The policy this system is named after: plan a window of slots under a moving threshold."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from services.scheduler.core.state import Outlook, Request
from services.scheduler.devices.profile import Profile
from services.scheduler.planning.options import WindowRule
from services.scheduler.planning.packing import pack_batches
from services.scheduler.planning.planner import Solution, greedy, solve
from services.scheduler.planning.policy import (
    MAX_SLOTS_IN_FLIGHT,
    WAIT,
    Decode,
    Grant,
    GroupView,
    Plan,
    make_rows,
)
from services.scheduler.planning.skipping import skippable_next
from services.scheduler.planning.threshold import Stretches, Threshold, ThresholdRule
from services.scheduler.planning.window import Window, make_window

MIN_DECODE_SHARE = 0.1
"""Of the device's time, in the decoder's predicted wait, however high the threshold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SynerDiff:
    """Continuous batching, chunks and skips planned together, with each part switchable.

    chunking: decodes may run in parts. skip: guidance may be skipped. planning: a window of slots
    ahead; off, each slot takes what it can (`greedy`) with a window of one. feedback: the
    threshold moves with the queues; off, it stays at its first value.
    """

    max_rows: int = 0
    chunking: bool = True
    skip: bool = True
    planning: bool = True
    feedback: bool = True
    rule: ThresholdRule = field(default_factory=ThresholdRule)
    window: WindowRule = field(default_factory=WindowRule)
    max_decode_wait_s: float = 3.0

    @property
    def admission_factor(self) -> int:
        """So that a full slot never waits for a prompt."""
        return 2

    @property
    def plans_overlap(self) -> bool:
        """Every part of it does."""
        return True

    def first_threshold(self) -> Threshold:
        """Where the rule begins."""
        return Threshold(value=self.rule.first_value)

    def adjust(self, view: GroupView) -> Threshold:
        """The threshold after one more slot."""
        stretches = predict_stretches(view)
        if not self.feedback:
            return Threshold(value=view.unet.threshold.value, stretches=stretches)
        return view.unet.threshold.after_slot(self.rule, stretches)

    def plan(self, view: GroupView) -> Plan:
        """More chunks beside the slots in flight; then the next gap or slot, if one can be sent."""
        unet = view.unet
        if any(one.request.has_gap and one.is_running for one in view.decodes):
            return WAIT
        is_full = len(unet.slots) >= MAX_SLOTS_IN_FLIGHT
        if is_full and not any(one.is_assigned and one.remaining for one in view.decodes):
            return WAIT
        rule = self._window_rule()
        batches = pack_batches(
            view.requests,
            unet,
            view.now,
            max_rows=self.max_rows,
            num_slots=max(rule.num_slots - len(unet.slots), 1),
            may_skip=skippable_next(view.requests, unet.profile) if self.skip else (),
        )
        if not batches and not unet.slots:
            return self._decode_alone(view)
        window = make_window(view, batches, rule)
        if not window.problem.stages:
            return WAIT
        return self._by_window(view, window, () if is_full or not batches else batches[0].requests)

    def _by_window(self, view: GroupView, window: Window, requests: Sequence[Request]) -> Plan:
        """What the window's solution says of now. requests: of the next slot; none for none."""
        solution = solve(window.problem) if self.planning else greedy(window.problem)
        outlook = Outlook(
            theta=view.unet.threshold.value,
            planned_ms=solution.ms - window.in_flight_ms + window.past_ms,
            alone_ms=window.alone_ms + window.past_alone_ms,
            is_feasible=solution.is_feasible,
            is_forced=window.is_forced,
        )
        queue = ChunkQueue(window.decodes, view.unet.profile)
        grants = _beside_slots_in_flight(queue, window, solution)
        if not requests:
            return Plan(grants=grants, outlook=outlook)
        gap, slot = solution.options[len(window.in_flight) :][:2]
        in_gap = queue.grant(gap.chunks, is_gap=True)
        if in_gap:
            return Plan(grants=grants + in_gap, outlook=outlook, spends=(gap.ms, 0.0))
        way = window.ways[slot.chunks, slot.skips]
        beside = queue.grant(slot.chunks, threads=way.kind.vae_threads, is_bound=True)
        skipped = frozenset(one.request_id for one in islice(window.skippable, slot.skips))
        return Plan(
            rows=make_rows(requests, skipped),
            threads=window.ways[0, slot.skips].kind.unet_threads,
            shape=way.shape,
            kind=way.kind,
            grants=grants + beside,
            outlook=outlook,
            spends=(slot.ms, window.first_alone_ms),
        )

    def _window_rule(self) -> WindowRule:
        return replace(
            self.window,
            num_slots=self.window.num_slots if self.planning else 1,
            max_decode_wait_s=self.max_decode_wait_s,
            chunking=self.chunking,
            skip=self.skip,
        )

    def _decode_alone(self, view: GroupView) -> Plan:
        """No step to run: every decode gets all of its chunks, to be run one after another."""
        queue = ChunkQueue(view.decodes, view.unet.profile)
        chunks = sum(one.remaining for one in view.decodes)
        return Plan(grants=queue.grant(chunks, is_gap=view.unet.takes_turns))


def _beside_slots_in_flight(
    queue: ChunkQueue, window: Window, solution: Solution
) -> tuple[Grant, ...]:
    """What the solution adds to the slots that were sent already."""
    grants: list[Grant] = []
    for sent, option in zip(window.in_flight, solution.options, strict=False):
        if option.chunks:
            threads = sent.vae_threads[option.chunks]
            added = queue.grant(option.chunks, threads=threads, beside_seq=sent.slot.seq)
            extra_ms = (option.ms - sent.base_ms) / max(len(added), 1)
            grants += [replace(one, extra_ms=extra_ms) for one in added]
    return tuple(grants)


class ChunkQueue:
    """Chunks that can be granted, of decodes at a VAE worker, in the order of service.

    Args:
        decodes: In that order.
        profile: Knows the threads that a decode takes alone.
    """

    def __init__(self, decodes: Iterable[Decode], profile: Profile) -> None:
        self._decodes = deque(one for one in decodes if one.is_assigned and one.remaining)
        self._num_taken = 0
        self._profile = profile

    def grant(
        self,
        chunks: int,
        *,
        threads: int | None = None,
        is_gap: bool = False,
        is_bound: bool = False,
        beside_seq: int = 0,
    ) -> tuple[Grant, ...]:
        """The next so many of them, as far as there are.

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
        timing = self._profile.decode(decode.request.batch_key.size)
        return timing.threads if timing else self._profile.threads


def predict_stretches(view: GroupView) -> Stretches:
    """Predicted wait over own service time of a request that comes to each stage now.

    Ahead of the UNet: who waits for admission or for a place in a slot, at the knee's rate. Ahead
    of the decoder: chunks not granted yet, at the share of the device that the threshold leaves.
    """
    profile = view.unet.profile
    running = [one for one in view.requests if one.has_forwards_left]
    size = running[0].batch_key.size if running else profile.slots[0].key
    knee = profile.knee(size)
    own_rows = sum(one.rows for one in running) / len(running) if running else 2.0
    beyond = max(sum(one.rows for one in running) - knee, 0.0)
    unet = (view.num_waiting * own_rows + beyond) / knee
    pending = [one for one in view.decodes if not one.is_coming]
    undone = sum(one.remaining / one.num_chunks for one in pending)
    share = max(1 - view.unet.threshold.value, MIN_DECODE_SHARE) if running else 1.0
    return Stretches(unet=unet, vae=undone / share if undone else 0.0)
