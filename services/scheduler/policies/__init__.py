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
    "MAX_SLOTS_IN_FLIGHT",
    "POLICY_NAMES",
    "Decode",
    "Grant",
    "GroupView",
    "Plan",
    "Policy",
    "PolicyOptions",
    "make_policy",
]

POLICY_NAMES = (
    "static",
    "dynamic",
    "continuous-serial",
    "continuous-parallel",
    "continuous-parallel-naive",
    "synerdiff",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """What can be switched; by default each policy at its best.

    max_rows: cap on a slot, 0 leaves it to the profile. chunking, planning, feedback: parts of
    synerdiff. skip: of every policy; None is on for synerdiff and off for the others. rule: of the
    threshold. max_decode_wait_s: an older decode is granted regardless of the threshold.
    """

    max_rows: int = 0
    chunking: bool = True
    skip: bool | None = None
    planning: bool = True
    feedback: bool = True
    rule: ThresholdRule = field(default_factory=ThresholdRule)
    max_decode_wait_s: float = 3.0


def make_policy(name: str, options: PolicyOptions | None = None) -> Policy:
    """The policy of that name, as in the settings.

    Raises:
        KeyError: There is none.
    """
    options = options or PolicyOptions()
    max_rows, skips = options.max_rows, bool(options.skip)
    match name:
        case "static":
            return static_batching(max_rows=max_rows, skips=skips)
        case "dynamic":
            return dynamic_batching(max_rows=max_rows, skips=skips)
        case "continuous-serial":
            return ContinuousSerial(max_rows=max_rows, skips=skips)
        case "continuous-parallel":
            return ContinuousParallel(max_rows=max_rows, skips=skips)
        case "continuous-parallel-naive":
            return ContinuousParallel(max_rows=max_rows, skips=skips, uses_default_threads=True)
        case "synerdiff":
            return SynerDiff(
                max_rows=max_rows,
                chunking=options.chunking,
                skip=options.skip is not False,
                planning=options.planning,
                feedback=options.feedback,
                rule=options.rule,
                max_decode_wait_s=options.max_decode_wait_s,
            )
        case _:
            raise KeyError(name)
