"""Times a model's UNet by rows, without any request."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch

from services.unet_worker.model import DiffusionModel
from services.unet_worker.slot import predict_noise
from shared.device import finish_work
from shared.worker import sample_for

LONG_MS = 1_000.0


def warm_up(
    model: DiffusionModel, sizes: Sequence[tuple[int, int]], row_counts: Sequence[int]
) -> None:
    """Run the UNet once at every (height, width) in pixels with every number of rows.

    Raises:
        ConfigurationError: A side is no multiple of the model's `side_multiple`.
    """
    model.check_sizes(sizes)
    for height, width in sizes:
        for num_rows in row_counts:
            _forward_zeros(model, num_rows, height, width)


def measure(
    model: DiffusionModel,
    row_counts: Sequence[int],
    *,
    size: tuple[int, int] | None = None,
    num_repeats: int = 5,
) -> dict[int, float]:
    """Median milliseconds of a UNet forward by its rows, at `size` or the model's default.

    row_counts: ascending. Those behind the second in a row that takes no less time per row are not
    measured: what is larger would only take longer. Behind the first that does so twice, where it
    takes long; what is short is rather lengthened by somebody else.
    """
    height, width = size or (model.facts.default_height, model.facts.default_width)
    medians_ms: dict[int, float] = {}
    least_row_ms, num_without_gain = math.inf, 0
    for num_rows in row_counts:
        _forward_zeros(model, num_rows, height, width)
        median_ms = _median_ms(model, num_rows, height, width, num_repeats)
        if median_ms / num_rows >= least_row_ms:
            median_ms = min(median_ms, _median_ms(model, num_rows, height, width, num_repeats))
        medians_ms[num_rows] = median_ms
        num_without_gain = num_without_gain + 1 if median_ms / num_rows >= least_row_ms else 0
        if num_without_gain == 2 or (num_without_gain and median_ms > LONG_MS):  # noqa: PLR2004
            break
        least_row_ms = min(least_row_ms, median_ms / num_rows)
    return medians_ms


def _median_ms(
    model: DiffusionModel, num_rows: int, height: int, width: int, num_repeats: int
) -> float:
    durations_s = [_forward_s(model, num_rows, height, width) for _ in range(num_repeats)]
    return statistics.median(durations_s) * 1e3


def measure_for(
    model: DiffusionModel, window_s: float, *, rows: int, size: tuple[int, int]
) -> float:
    """Median milliseconds of a forward, one after another for so long, at `size` in pixels."""
    durations_s = sample_for(window_s, lambda: _forward_s(model, rows, *size))
    return statistics.median(durations_s) * 1e3


def _forward_s(model: DiffusionModel, num_rows: int, height: int, width: int) -> float:
    started_at = time.perf_counter()
    _forward_zeros(model, num_rows, height, width)
    return time.perf_counter() - started_at


@torch.inference_mode()
def _forward_zeros(model: DiffusionModel, num_rows: int, height: int, width: int) -> None:
    predict_noise(model, *zero_inputs(model, num_rows, height, width))
    finish_work(model.device)


def zero_inputs(
    model: DiffusionModel, num_rows: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `predict_noise` takes, of so many rows of pictures of that size in pixels."""
    facts = model.facts
    factor = facts.vae_scale_factor

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros((num_rows, *shape), dtype=dtype, device=model.device)

    return (
        zeros(facts.latent_channels, height // factor, width // factor),
        zeros(),
        zeros(facts.max_tokens, facts.text_width, dtype=model.dtype),
        zeros(facts.timestep_cond_channels, dtype=model.dtype),
    )
