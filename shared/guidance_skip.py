"""Adaptive skip-CFG: its levels, and how far apart a request's full steps may lie.

A guided step may run its positive row only and take the guidance direction extrapolated from the
request's last two full steps ("skipped" step). Plain numbers: the UNet worker decides by them, and
the simulated one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipParameters:
    """One level of adaptive skip-CFG; lengths are fractions of the trajectory.

    warm_up: full steps at the beginning. first_gap, gap_growth: a full step at fraction u of the
    trajectory must be followed by the next one within first_gap + gap_growth * u, and within
    max_gap. max_error: error of the extrapolation that is put up with; where a full step has
    measured it, it is taken to grow linearly with the distance. slope: share of the linear
    extrapolation that is applied (0 reuses the last direction, 1 extrapolates fully). decay: share
    of the last direction that is lost meanwhile. max_reach: distance that both are applied over, in
    intervals between the last two full steps.
    """

    warm_up: float
    first_gap: float
    gap_growth: float
    max_gap: float
    max_error: float
    slope: float = 0.48
    decay: float = 0.11
    max_reach: float = 1.5

    def steps_in_gap(self, last_full: int, num_steps: int) -> int:
        """How many steps in a row may be skipped behind full step `last_full`, by the gap alone.

        None behind step 0: nothing is extrapolated from a single full step.
        """
        if last_full < 1 or last_full + 1 < self.warm_up * num_steps:
            return 0
        gap = min(
            self.first_gap * num_steps + self.gap_growth * last_full, self.max_gap * num_steps
        )
        return max(math.floor(gap + 1e-9) - 1, 0)


SKIP_LEVELS: Mapping[str, SkipParameters | None] = {
    "off": None,
    # Full at steps 0 1 3 5 8 11 15 19 23 of 25.
    "balanced": SkipParameters(
        warm_up=0.07, first_gap=0.1, gap_growth=0.145, max_gap=0.167, max_error=0.5
    ),
    # Full at steps 0 1 6 11 17 23 of 25.
    "fast": SkipParameters(
        warm_up=0.07, first_gap=0.208, gap_growth=0.128, max_gap=0.246, max_error=1.5
    ),
}
"""Levels by the name that a request's `guidance_skip` carries, the exact one first; found by
`bench skip_search` on the emoji model (docs/fidelity.md)."""
