"""Skip-CFG's rules, and the arithmetic of guidance."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.unet_worker.denoising.guidance import (
    GuidanceRecord,
    can_skip,
    extrapolate,
    extrapolation_weights,
    guidance_error,
    guide,
    guide_from_text,
    num_skippable,
)
from shared.guidance_skip import SKIP_LEVELS, SkipParameters

BALANCED = SKIP_LEVELS["balanced"]
assert BALANCED is not None


def _full_steps(parameters: SkipParameters, num_steps: int, error: float = 0.0) -> list[int]:
    """The steps that run in full when everything that may be skipped is skipped."""
    record, full = GuidanceRecord(), []
    for step_index in range(num_steps):
        if not can_skip(parameters, record, step_index, num_steps):
            record = record.after_full_step(step_index, error)
            full.append(step_index)
    return full


def test_the_gaps_between_full_steps_grow_along_the_trajectory() -> None:
    assert _full_steps(BALANCED, 25) == [0, 1, 3, 5, 8, 11, 15, 19, 23]


def test_a_request_whose_extrapolation_is_off_is_refreshed_more_often() -> None:
    counts = [len(_full_steps(BALANCED, 25, error)) for error in (0.0, 0.2, 0.4, 0.6)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 25


def test_off_never_skips() -> None:
    record = GuidanceRecord(full_steps=(8, 10), error=0.0)
    assert not can_skip(SKIP_LEVELS["off"], record, 11, 25)


@given(
    parameters=st.builds(
        SkipParameters,
        warm_up=st.floats(0, 0.5),
        first_gap=st.floats(0, 0.5),
        gap_growth=st.floats(0, 1),
        max_gap=st.floats(0, 0.5),
        max_error=st.floats(0, 2),
    ),
    num_steps=st.integers(1, 100),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=50, deadline=None)
def test_warm_up_is_full_and_no_gap_is_longer_than_allowed(
    parameters: SkipParameters, num_steps: int, seed: int
) -> None:
    chance = random.Random(seed)
    record, last_full = GuidanceRecord(), -1
    for step_index in range(num_steps):
        if can_skip(parameters, record, step_index, num_steps):
            assert step_index >= 2
            assert step_index >= parameters.warm_up * num_steps
            assert step_index - last_full < parameters.max_gap * num_steps + 1e-6
            assert record.error < math.inf
        else:
            error = chance.choice([0.0, 0.1, 0.5, 2.0, math.inf])
            record = record.after_full_step(step_index, error)
            last_full = step_index


def test_an_error_that_is_not_finite_forbids_skipping() -> None:
    record = GuidanceRecord(full_steps=(9,)).after_full_step(10, math.nan)
    assert num_skippable(BALANCED, record, 25) == 0


def test_the_extrapolation_reaches_at_most_so_many_intervals() -> None:
    parameters = replace(BALANCED, slope=0.5, decay=0.1, max_reach=1.0)
    record = GuidanceRecord(full_steps=(7, 10))
    weights = [extrapolation_weights(parameters, record, step) for step in (11, 12, 13, 14)]
    assert [newest for newest, _ in weights] == pytest.approx([1 + 0.4 / 3, 1 + 0.8 / 3, 1.4, 1.4])
    assert [older for _, older in weights] == pytest.approx([-0.5 / 3, -1.0 / 3, -0.5, -0.5])


def test_the_first_direction_is_reused_as_it_is() -> None:
    assert extrapolation_weights(BALANCED, GuidanceRecord(full_steps=(0,)), 1) == (1.0, 0.0)


def test_guidance_from_the_text_row_alone_equals_full_guidance_where_the_direction_is_right() -> (
    None
):
    uncond, text = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    scale = torch.tensor([1.5, 5.0, 12.0], dtype=torch.float64).view(-1, 1, 1, 1)
    full = guide(uncond, text - uncond, scale)
    torch.testing.assert_close(guide_from_text(text, text - uncond, scale), full)


def test_a_direction_that_changes_linearly_is_extrapolated_exactly_by_the_full_slope() -> None:
    start, change = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    older, newest, actual = start + 4 * change, start + 6 * change, start + 7 * change
    straight = replace(BALANCED, slope=1.0, decay=0.0)
    weights = extrapolation_weights(straight, GuidanceRecord(full_steps=(4, 6)), 7)
    estimate = extrapolate(newest, older, torch.tensor(weights).view(2, 1, 1, 1, 1))
    torch.testing.assert_close(estimate, actual)


def test_the_error_is_what_the_estimate_changes_in_the_guided_prediction() -> None:
    uncond, text, wrong = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1.5, 7.0]).view(-1, 1, 1, 1)
    direction = text - uncond
    guided = guide(uncond, direction, scale)
    skipped = guide_from_text(text, direction + wrong, scale)
    expected = (skipped - guided).flatten(1).norm(dim=1) / guided.flatten(1).norm(dim=1)
    error = guidance_error(direction + wrong, direction, guided, scale)
    torch.testing.assert_close(error, expected)
    assert error[1] > error[0]
