"""When a simulated worker lets a step be skipped."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipPattern:
    """When a simulated worker lets a step be skipped: by gaps that grow along the trajectory.

    The real worker also measures its error and refreshes difficult pictures more often; that is
    not simulated. Lengths are fractions of the trajectory.
    """

    warm_up: float
    first_gap: float
    gap_growth: float
    max_gap: float

    def steps_allowed(self, last_full: int, num_steps: int) -> int:
        """How many steps in a row may be skipped behind a full one."""
        if last_full < 1 or last_full + 1 < self.warm_up * num_steps:
            return 0
        gap = min(
            self.first_gap * num_steps + self.gap_growth * last_full, self.max_gap * num_steps
        )
        return max(floor(gap + 1e-9) - 1, 0)


SKIP_PATTERNS = {
    "balanced": SkipPattern(warm_up=0.12, first_gap=0.052, gap_growth=0.25, max_gap=0.16),
    "fast": SkipPattern(warm_up=0.08, first_gap=0.06, gap_growth=0.35, max_gap=0.24),
}
