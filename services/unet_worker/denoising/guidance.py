"""Classifier-free guidance, and when a guided step may do without its negative row.

The guidance direction of a step is noise_pred_text - noise_pred_uncond. It changes slowly along a
trajectory, so that a step may run the positive row only and take the direction extrapolated from
the request's last two full steps ("skipped" step). Which steps may be skipped follows from two
limits: the gap to the last full step, which grows along the trajectory, and the error that the
extrapolation would have made at that full step, where it was measured. Everything here is a pure
function.

That guidance is nearly an affine function of past predictions is from Castillo et al., "Adaptive
Guidance" (arXiv 2312.12487, there called LinearAG, with coefficients fitted by step and model).
Fitted coefficients turned out hardly better here than a fixed share of the linear extrapolation,
and these work with any model, sampler and number of steps. The control by the request's own error
is that of adaptive step sizes of differential equations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shared.guidance_skip import SkipParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceRecord:
    """What a request remembers of its full steps.

    full_steps: step indices of the last two, oldest first. error: `guidance_error` of the
    extrapolated direction at the last one, inf while unknown. distance: steps it was extrapolated
    over.
    """

    full_steps: tuple[int, ...] = ()
    error: float = math.inf
    distance: int = 1

    def after_full_step(self, step_index: int, error: float) -> GuidanceRecord:
        """The record after a full step; `error` counts only where a direction was known before."""
        if not self.full_steps:
            return GuidanceRecord(full_steps=(step_index,))
        return GuidanceRecord(
            full_steps=(self.full_steps[-1], step_index),
            error=error if math.isfinite(error) else math.inf,
            distance=step_index - self.full_steps[-1],
        )


def num_skippable(parameters: SkipParameters, record: GuidanceRecord, num_steps: int) -> int:
    """How many steps in a row may be skipped right after the record's last full step."""
    if len(record.full_steps) < 2:  # noqa: PLR2004
        return 0
    by_gap = parameters.steps_in_gap(record.full_steps[-1], num_steps)
    if record.error <= 0:
        return by_gap
    return min(by_gap, math.floor(parameters.max_error * record.distance / record.error))


def can_skip(
    parameters: SkipParameters | None, record: GuidanceRecord, step_index: int, num_steps: int
) -> bool:
    """Whether guided step `step_index` may extrapolate its direction."""
    if parameters is None or not record.full_steps:
        return False
    return 0 < step_index - record.full_steps[-1] <= num_skippable(parameters, record, num_steps)


def extrapolation_weights(
    parameters: SkipParameters, record: GuidanceRecord, step_index: int
) -> tuple[float, float]:
    """The weights in `extrapolate` for a step after the record's last full one."""
    if len(record.full_steps) < 2:  # noqa: PLR2004
        return 1.0, 0.0
    older, newest = record.full_steps
    reach = min((step_index - newest) / (newest - older), parameters.max_reach)
    return 1.0 + (parameters.slope - parameters.decay) * reach, -parameters.slope * reach


def guide(
    noise_pred_uncond: torch.Tensor, direction: torch.Tensor, guidance_scale: torch.Tensor
) -> torch.Tensor:
    """Guided prediction uncond + s (text - uncond), in the order in which diffusers computes it."""
    return noise_pred_uncond + guidance_scale * direction


def guide_from_text(
    noise_pred_text: torch.Tensor, direction: torch.Tensor, guidance_scale: torch.Tensor
) -> torch.Tensor:
    """The same from the positive row alone: text + (s - 1) (text - uncond)."""
    return noise_pred_text + (guidance_scale - 1.0) * direction


def extrapolate(newest: torch.Tensor, older: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The direction w0 newest + w1 older, shapes (rows, C, h, w) and (2, rows, 1, 1, 1)."""
    return weights[0] * newest + weights[1] * older


def guidance_error(
    estimate: torch.Tensor,
    direction: torch.Tensor,
    noise_pred: torch.Tensor,
    guidance_scale: torch.Tensor,
) -> torch.Tensor:
    """What an estimated direction would have changed in the guided prediction, relative to it.

    (s - 1) |estimate - direction| / |noise_pred| per row, shape (rows,); inf or nan where the
    prediction is 0. Far better than the error relative to the direction, it tells which requests
    suffer: a direction that is small or weakly scaled may be far off without any harm.

    Args:
        estimate: Extrapolated directions, (rows, C, h, w).
        direction: The actual ones.
        noise_pred: The guided predictions made with the actual ones.
        guidance_scale: s, (rows, 1, 1, 1).
    """
    wrong = (guidance_scale - 1.0) * (estimate - direction)
    change, size = ((one.flatten(1) ** 2).sum(dim=1).sqrt() for one in (wrong, noise_pred))
    return change / size
