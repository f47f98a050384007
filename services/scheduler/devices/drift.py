"""Online correction of a profile: how much slower a device is than its profile says, by kind.

A slow multiplicative drift: each measured duration moves its kind's factor by a small share of the
ratio, in logarithms, so that one outlier moves it by a few percent at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WEIGHT = 0.05
"""Share of a measured ratio that goes into the factor: half of a lasting change in 14 slots."""

MAX_RATIO = 2.0
"""One measurement counts as at most this much slower or faster than predicted."""

MAX_FACTOR = 8.0
"""Beyond this the profile is of another device; the factor stays here."""

ALONE = "alone"
BESIDE = "beside"
CHUNKS = "chunks"
"""The kinds: a slot alone, a slot beside chunks, chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Factors on the profile's durations by kind; 1 where nothing was measured."""

    factors: Mapping[str, float] = field(default_factory=dict)

    def factor(self, kind: str) -> float:
        """Return what to multiply the profile's durations of that kind with."""
        return self.factors.get(kind, 1.0)

    def after(self, kind: str, *, predicted_ms: float, measured_ms: float) -> Drift:
        """Return the drift after one measurement.

        predicted_ms: with this drift's own factor applied; nothing changes where it is not
        positive.
        """
        if predicted_ms <= 0 or measured_ms <= 0:
            return self
        ratio = min(max(measured_ms / predicted_ms, 1 / MAX_RATIO), MAX_RATIO)
        factor = self.factor(kind) * ratio**WEIGHT
        clamped = min(max(factor, 1 / MAX_FACTOR), MAX_FACTOR)
        return Drift(factors={**self.factors, kind: clamped})
