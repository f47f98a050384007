"""Policies: which rows run in the next slot, which decode chunks may start, on how many threads."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.scheduler.policies.batches import dynamic_batching, static_batching
from services.scheduler.policies.continuous import ContinuousParallel, ContinuousSerial
from services.scheduler.policies.synerdiff import SynerDiff
from services.scheduler.policy import (
    MAX_SLOTS_IN_FLIGHT,
    Decode,
    Grant,
    GroupView,
    Plan,
    Policy,
)
from services.scheduler.threshold import ThresholdRule

__all__ = [
    "BASELINES",
    "MAX_SLOTS_IN_FLIGHT",
    "PARTS",
    "POLICY_NAMES",
    "Decode",
    "Grant",
    "GroupView",
    "Plan",
    "Policy",
    "PolicyOptions",
    "make_policy",
]

BASELINES = ("static", "dynamic", "continuous-serial", "continuous-parallel")
"""At their best: batch cap and threads from the profile. They don't skip guidance by themselves."""

PARTS = ("chunking", "skip", "planning", "feedback")
"""Of synerdiff, each of which can be left out."""

WITH_SKIP = "-with-skip"
WITHOUT = "-without-"

POLICY_NAMES = (
    *BASELINES,
    *(name + WITH_SKIP for name in BASELINES),
    "continuous-parallel-naive",
    "synerdiff",
    *(f"synerdiff{WITHOUT}{part}" for part in PARTS),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """What can be tuned; by default each policy at its best.

    max_rows: cap on a slot, 0 leaves it to the profile. rule: of the threshold. max_decode_wait_s:
    an older decode is granted regardless of the threshold.
    """

    max_rows: int = 0
    rule: ThresholdRule = field(default_factory=ThresholdRule)
    max_decode_wait_s: float = 3.0


def make_policy(name: str, options: PolicyOptions | None = None) -> Policy:
    """The policy of that name, as in the settings.

    Raises:
        KeyError: There is none.
    """
    if name not in POLICY_NAMES:
        raise KeyError(name)
    options = options or PolicyOptions()
    base, _, without = name.partition(WITHOUT)
    skips, base = base.endswith(WITH_SKIP), base.removesuffix(WITH_SKIP)
    match base:
        case "static":
            return static_batching(max_rows=options.max_rows, skips=skips)
        case "dynamic":
            return dynamic_batching(max_rows=options.max_rows, skips=skips)
        case "continuous-serial":
            return ContinuousSerial(max_rows=options.max_rows, skips=skips)
        case "continuous-parallel":
            return ContinuousParallel(max_rows=options.max_rows, skips=skips)
        case "continuous-parallel-naive":
            return ContinuousParallel(max_rows=options.max_rows, uses_default_threads=True)
        case _:
            return SynerDiff(
                max_rows=options.max_rows,
                chunking=without != "chunking",
                skip=without != "skip",
                planning=without != "planning",
                feedback=without != "feedback",
                rule=options.rule,
                max_decode_wait_s=options.max_decode_wait_s,
            )
