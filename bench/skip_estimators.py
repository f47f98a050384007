"""How well a skipped step's guidance direction can be told from what is known by then.

Candidates: the last direction as it is, shares of the linear extrapolation, the quadratic one
(Taylor's second order), and affine functions of past predictions with coefficients fitted to half
of the requests, for all steps at once or for each step (LinearAG of arXiv 2312.12487).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.trajectories import Trajectories

FULL_STEPS = (0, 0.04, 0.08, 0.12, 0.2, 0.28, 0.4, 0.52, 0.68, 0.84)
"""Fractions of the trajectory at which directions are known: gaps that grow."""

Terms = list[Tensor]
_Estimate = Callable[[Terms], Tensor]


def compare_estimators(trajectories: Trajectories) -> dict[str, float]:
    """Return each candidate's RMS error over that of the last direction, at skipped steps.

    All are judged by the second half of the requests, since the fitted ones have seen the first.
    """
    terms = _all_terms(trajectories)
    half = len(trajectories.cases) // 2
    fixed: dict[str, _Estimate] = {
        "last direction": lambda known: known[0],
        **{f"{share} x linear": _linear(share) for share in (0.3, 0.5, 0.6, 0.7, 1.0)},
        "quadratic": lambda known: known[0] + known[1] + known[2],
    }
    errors = {
        name: sum(_error(estimate(known), actual, half) for known, actual in terms)
        for name, estimate in fixed.items()
    }
    for name, count in (("directions", 2), ("directions and text", 5)):
        fits = [_fit(terms, count, half)] * len(terms)
        fits_by_step = [_fit([step_terms], count, half) for step_terms in terms]
        for kind, weights in (("all steps", fits), ("each step", fits_by_step)):
            errors[f"affine in {name}, fitted to {kind}"] = sum(
                _error(_combine(known, weight), actual, half)
                for (known, actual), weight in zip(terms, weights, strict=True)
            )
    base = errors["last direction"]
    return {name: round((error / base) ** 0.5, 4) for name, error in errors.items()}


def _linear(share: float) -> _Estimate:
    return lambda known: known[0] + share * known[1]


def _all_terms(trajectories: Trajectories) -> list[tuple[Terms, Tensor]]:
    """Return what each skipped step's estimate can be made of, and the actual direction.

    The last direction, its linear and quadratic increments, the text prediction's change since, and
    that prediction's linear increment.
    """
    num_steps = trajectories.num_steps
    full = sorted({round(fraction * num_steps) for fraction in FULL_STEPS})
    directions, text = trajectories.directions, trajectories.text
    found = []
    for step in range(full[2] + 1, num_steps):
        if step in full:
            continue
        oldest, older, newest = [known for known in full if known < step][-3:]
        reach = (step - newest) / (newest - older)
        slope = (directions[newest] - directions[older]) / (newest - older)
        older_slope = (directions[older] - directions[oldest]) / (older - oldest)
        bend = (slope - older_slope) / (newest - oldest)
        known = [
            directions[newest],
            slope * (step - newest),
            bend * (step - newest) * (step - older),
            text[step] - text[newest],
            reach * (text[newest] - text[older]),
        ]
        found.append((known, directions[step]))
    return found


def _error(estimate: Tensor, actual: Tensor, half: int) -> float:
    return float((estimate[half:] - actual[half:]).square().mean())


def _fit(terms: Sequence[tuple[Terms, Tensor]], count: int, half: int) -> Tensor:
    """Return least-squares weights of the first `count` terms over half of the requests."""
    columns = torch.cat(
        [
            torch.stack([term[:half].flatten() for term in known[:count]], dim=1)
            for known, _ in terms
        ]
    )
    wanted = torch.cat([actual[:half].flatten() for _, actual in terms])
    weights: Tensor = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
    return weights


def _combine(known: Terms, weights: Tensor) -> Tensor:
    return torch.stack(known[: len(weights)]).mul(weights.view(-1, 1, 1, 1, 1)).sum(dim=0)
