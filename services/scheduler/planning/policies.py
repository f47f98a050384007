"""The policies that the settings offer."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.scheduler.planning.continuous import ContinuousParallel
from services.scheduler.planning.policy import Policy
from services.scheduler.planning.synerdiff import SynerDiff
from services.scheduler.planning.threshold import ThresholdRule

POLICY_NAMES = ("synerdiff", "continuous-parallel")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """What the settings tune; by default each policy at its best."""

    max_rows: int = 0
    """The most rows of a slot; 0 leaves it to the profile."""
    rule: ThresholdRule = field(default_factory=ThresholdRule)
    """By which the threshold moves."""
    max_decode_wait_s: float = 3.0
    """A decode that has waited longer is granted whatever the threshold says."""


def make_policy(name: str, options: PolicyOptions | None = None) -> Policy:
    """Return the policy of that name.

    Raises:
        KeyError: There is none.
    """
    options = options or PolicyOptions()
    match name:
        case "synerdiff":
            return SynerDiff(
                max_rows=options.max_rows,
                rule=options.rule,
                max_decode_wait_s=options.max_decode_wait_s,
            )
        case "continuous-parallel":
            return ContinuousParallel(max_rows=options.max_rows)
        case _:
            raise KeyError(name)
