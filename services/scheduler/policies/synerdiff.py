"""The policy this system is named after: plan a window of slots under a moving threshold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice

from services.scheduler.options import WindowRule
from services.scheduler.packing import pack_batches
from services.scheduler.planner import greedy, solve
from services.scheduler.policy import (
    MAX_SLOTS_IN_FLIGHT,
    WAIT,
    Decode,
    Grant,
    GroupView,
    Plan,
    make_rows,
)
from services.scheduler.state import Outlook
from services.scheduler.threshold import Stretches, Threshold, ThresholdRule
from services.scheduler.window import make_window

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
    def grants_at_once(self) -> bool:
        """Chunks go with slots, or into gaps that no slot is queued behind."""
        return False

    @property
    def admission_factor(self) -> int:
        """So that a full slot never waits for a prompt."""
        return 2

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
        """The next gap or slot, with the chunks beside it."""
        unet = view.unet
        if any(one.request.has_gap and one.is_running for one in view.decodes):
            return WAIT
        if len(unet.slots) >= MAX_SLOTS_IN_FLIGHT:
            return WAIT
        rule = self._window_rule()
        batches = pack_batches(
            view.requests, unet, view.now, max_rows=self.max_rows, num_slots=rule.num_slots
        )
        if not batches:
            return WAIT if unet.slots else self._decode_alone(view)
        window = make_window(view, batches, rule)
        solution = solve(window.problem) if self.planning else greedy(window.problem)
        gap, slot = solution.options[:2]
        outlook = Outlook(
            theta=unet.threshold.value,
            planned_ms=solution.ms + window.past_ms,
            alone_ms=window.alone_ms + window.past_alone_ms,
            is_feasible=solution.is_feasible,
            is_forced=window.is_forced,
        )
        if gap.chunks:
            grants = self._grants(view, window.decodes, gap.chunks, is_gap=True)
            if grants:
                return Plan(grants=grants, outlook=outlook, spends=(gap.ms, 0.0))
        kind = window.kinds[slot.chunks]
        grants = self._grants(view, window.decodes, slot.chunks, threads=kind.vae_threads)
        skipped = frozenset(one.request_id for one in islice(window.skippable, slot.skips))
        return Plan(
            rows=make_rows(batches[0].requests, skipped),
            threads=kind.unet_threads,
            kind=kind,
            grants=grants,
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
        waiting = [one for one in view.decodes if one.is_assigned and one.remaining]
        chunks = sum(one.remaining for one in waiting)
        return Plan(grants=self._grants(view, waiting, chunks, is_gap=False))

    def _grants(
        self,
        view: GroupView,
        decodes: tuple[Decode, ...] | list[Decode],
        chunks: int,
        *,
        is_gap: bool = False,
        threads: int | None = None,
    ) -> tuple[Grant, ...]:
        """So many chunks for the decodes in their order, as far as they are at a VAE worker.

        threads: beside a slot; None for the decoder's best alone.
        """
        grants = []
        for decode in decodes:
            if not decode.is_assigned or not chunks:
                continue
            taken = min(decode.remaining, chunks)
            chunks -= taken
            timing = view.unet.profile.decode(decode.request.batch_key.size)
            alone = timing.threads if timing else view.unet.profile.threads
            grants.append(
                Grant(
                    request_id=decode.request.request_id,
                    chunks=taken,
                    threads=alone if threads is None else threads,
                    is_gap=is_gap,
                    is_bound=threads is not None,
                )
            )
        return tuple(grants)


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
    undone = sum(one.remaining / one.num_chunks for one in view.decodes)
    share = max(1 - view.unet.threshold.value, MIN_DECODE_SHARE) if running else 1.0
    return Stretches(unet=unet, vae=undone / share if undone else 0.0)
