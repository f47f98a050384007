"""Times a model's forwards by rows, without any request."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.unet_worker.backends.protocol import Backend
from services.unet_worker.families.protocol import Family
from shared.worker import sample_for

LONG_MS = 1_000.0
"""Forwards that take longer are not measured beyond the first number of rows without gain."""

_MAX_WITHOUT_GAIN = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stopwatch:
    """Times forwards of rows of zeros."""

    family: Family
    """Whose forwards."""

    backend: Backend
    """How they are run."""

    def warm_up(self, sizes: Sequence[tuple[int, int]], row_counts: Sequence[int]) -> None:
        """Run a forward at every (height, width) in pixels with every number of rows.

        Raises:
            ConfigurationError: A side is no multiple of the model's `side_multiple`.
        """
        self.family.facts.check_sizes(sizes)
        for size in sizes:
            for num_rows in row_counts:
                self.forward_s(num_rows, size)

    def measure(
        self,
        row_counts: Sequence[int],
        *,
        size: tuple[int, int] | None = None,
        num_repeats: int = 5,
    ) -> dict[int, float]:
        """Return median milliseconds of a forward by its rows, at `size` or the default size.

        Args:
            row_counts: Ascending. Those behind the second in a row that takes no less time per row
                are not measured: what is larger would only take longer. Behind the first that does
                so twice, where it takes long; what is short is rather lengthened by somebody else.
            size: (height, width) in pixels.
            num_repeats: Forwards that a median is taken of.
        """
        size = size or (self.family.facts.default_height, self.family.facts.default_width)
        medians_ms: dict[int, float] = {}
        least_row_ms, num_without_gain = math.inf, 0
        for num_rows in row_counts:
            self.forward_s(num_rows, size)
            median_ms = self._median_ms(num_rows, size, num_repeats)
            if median_ms / num_rows >= least_row_ms:
                median_ms = min(median_ms, self._median_ms(num_rows, size, num_repeats))
            medians_ms[num_rows] = median_ms
            num_without_gain = num_without_gain + 1 if median_ms / num_rows >= least_row_ms else 0
            if num_without_gain == _MAX_WITHOUT_GAIN or (num_without_gain and median_ms > LONG_MS):
                break
            least_row_ms = min(least_row_ms, median_ms / num_rows)
        # Fewer rows don't take longer than more: where they seem to, something came between.
        longest_ms = math.inf
        for num_rows in sorted(medians_ms, reverse=True):
            if medians_ms[num_rows] > longest_ms:
                self.forward_s(num_rows, size)
                again_ms = self._median_ms(num_rows, size, num_repeats)
                medians_ms[num_rows] = min(medians_ms[num_rows], again_ms, longest_ms)
            longest_ms = medians_ms[num_rows]
        return medians_ms

    def measure_for(self, window_s: float, *, rows: int, size: tuple[int, int]) -> float:
        """Return median milliseconds of a forward, one after another for so long."""
        durations_s = sample_for(window_s, lambda: self.forward_s(rows, size))
        return statistics.median(durations_s) * 1e3

    @torch.inference_mode()
    def forward_s(self, num_rows: int, size: tuple[int, int]) -> float:
        """Return the seconds that a forward took."""
        inputs = zero_inputs(self.family, num_rows, *size)
        started_at = time.perf_counter()
        self.backend.predict(*inputs)
        self.backend.finish()
        return time.perf_counter() - started_at

    def _median_ms(self, num_rows: int, size: tuple[int, int], num_repeats: int) -> float:
        return statistics.median(self.forward_s(num_rows, size) for _ in range(num_repeats)) * 1e3


def zero_inputs(
    family: Family, num_rows: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return what `Backend.predict` takes, of so many rows of pictures of that size in pixels."""
    latents = family.latents_format
    factor = latents.vae_scale_factor

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros((num_rows, *shape), dtype=dtype, device=family.device)

    return (
        zeros(latents.channels, height // factor, width // factor),
        zeros(),
        {name: zeros(*spec.shape, dtype=spec.dtype) for name, spec in family.conditions.items()},
    )
