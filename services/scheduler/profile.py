"""What a device can do, as measured: the duration of a slot by its rows, and the knee."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

KNEE_FRACTION = 0.95
"""The knee is the smallest batch with at least this share of the best throughput."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """Slot durations, alone on the device. step_ms: median by number of rows; not empty."""

    step_ms: Mapping[int, float]
    knee: int = field(init=False)

    def __post_init__(self) -> None:
        """Find the knee once.

        Raises:
            ValueError: There is no measurement, or one is not positive.
        """
        if not self.step_ms or any(ms <= 0 for ms in self.step_ms.values()):
            raise ValueError(f"step_ms needs positive durations by rows, got {dict(self.step_ms)}")
        best = max(rows / ms for rows, ms in self.step_ms.items())
        knee = min(rows for rows, ms in self.step_ms.items() if rows / ms >= KNEE_FRACTION * best)
        object.__setattr__(self, "knee", knee)

    def slot_ms(self, rows: int) -> float:
        """Expected duration of a slot, linear between measurements and beyond them."""
        sizes = sorted(self.step_ms)
        if rows in self.step_ms:
            return self.step_ms[rows]
        if rows < sizes[0] or len(sizes) == 1:
            return (
                self.step_ms[sizes[0]] * rows / sizes[0]
                if rows > sizes[0]
                else (self.step_ms[sizes[0]])
            )
        upper = min(bisect_left(sizes, rows), len(sizes) - 1)
        low, high = sizes[upper - 1], sizes[upper]
        slope = (self.step_ms[high] - self.step_ms[low]) / (high - low)
        return self.step_ms[low] + slope * (rows - low)
