"""What is foretold of skip levels from recorded requests, and how estimators compare."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.drawing import Case, anywhere
from bench.skip_estimators import compare_estimators
from bench.skip_replay import join, make_replay, replay
from bench.trajectories import Trajectories
from shared.guidance_skip import SKIP_LEVELS

NUM_STEPS, NUM_CASES = 25, 4
BALANCED = SKIP_LEVELS["balanced"]
assert BALANCED is not None
STRAIGHT = replace(anywhere(BALANCED), slope=1.0, decay=0.0, max_reach=100.0)


def _trajectories(power: int) -> Trajectories:
    """Directions that change as the step index to that power."""
    chance = torch.Generator().manual_seed(0)
    start, change = torch.randn(2, NUM_CASES, 2, 4, 4, generator=chance)
    steps = (torch.arange(NUM_STEPS).view(-1, 1, 1, 1, 1) / 10) ** power
    directions = start + steps * change
    text = torch.randn(NUM_STEPS, NUM_CASES, 2, 4, 4, generator=chance)
    return Trajectories(
        cases=tuple(Case(caption="", picture=0, seed=i) for i in range(NUM_CASES)),
        uncond=text - directions,
        text=text,
        latents=text[-1],
    )


def test_what_changes_linearly_is_foretold_to_cost_nothing_with_the_full_slope() -> None:
    outcome = replay(make_replay(_trajectories(1), {0: 1.0}), STRAIGHT)
    assert outcome.rows_saved == pytest.approx([23 / 50] * NUM_CASES)
    assert outcome.errors.max() < 1e-3  # of products in float32


def test_errors_grow_with_their_gains_and_with_a_worse_estimate() -> None:
    def errors(gain: float, slope: float) -> float:
        recorded = make_replay(_trajectories(1), {0: gain, NUM_STEPS - 1: gain})
        return float(replay(recorded, replace(STRAIGHT, slope=slope)).errors.mean())

    assert errors(2.0, 0.5) == pytest.approx(2 * errors(1.0, 0.5))
    assert errors(1.0, 0.0) > errors(1.0, 0.5) > errors(1.0, 0.9) > 0


def test_a_request_that_is_foretold_badly_is_refreshed_more_often() -> None:
    recorded = make_replay(_trajectories(3), {0: 1.0})
    loose, tight = (replay(recorded, replace(BALANCED, max_error=error)) for error in (1e9, 0.05))
    assert tight.rows_saved.mean() < loose.rows_saved.mean()
    assert tight.errors.mean() < loose.errors.mean()


def test_joined_records_are_foretold_as_each_alone() -> None:
    recorded = make_replay(_trajectories(2), {0: 1.0})
    both = replay(join([recorded, recorded]), BALANCED)
    assert both.errors.tolist() == pytest.approx(2 * replay(recorded, BALANCED).errors.tolist())


def test_of_what_changes_quadratically_the_quadratic_estimate_is_right() -> None:
    errors = compare_estimators(_trajectories(2))
    assert errors["quadratic"] < 1e-3
    assert errors["1.0 x linear"] < errors["0.5 x linear"] < errors["last direction"] == 1.0
    assert errors["affine in directions, fitted to each step"] < errors["1.0 x linear"]
