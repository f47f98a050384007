"""Whose guidance the scheduler takes for skippable, before the worker has told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_world import World, make_request, make_worker

from services.scheduler.core.state import Request, Stage
from services.scheduler.devices.choice import profile_in_short
from services.scheduler.devices.profile import SkipLevel
from services.scheduler.planning.skipping import may_skip_next


def a_request(*, guidance_skip: str = "balanced", num_forwards: int = 25, **fields: int) -> Request:
    return Request(
        request=make_request("r", steps=25, guidance_skip=guidance_skip),
        stage=Stage.DENOISING,
        attempt="1-1",
        num_forwards=num_forwards,
        **fields,
    )


def may_skip_at(**fields: int) -> list[int]:
    """Steps that may be skipped with full step 8 and whatever comes behind it in flight."""
    return [
        step
        for step in range(9, 14)
        if may_skip_next(a_request(last_full=8, done_step=8, next_step=step, **fields))
    ]


def test_behind_a_full_step_in_flight_the_level_s_gap_tells() -> None:
    assert may_skip_at() == [9, 10]


def test_behind_a_full_step_that_is_done_the_worker_tells() -> None:
    told = {"last_full": 8, "done_step": 9}
    assert not may_skip_next(a_request(next_step=9, skip_steps=0, **told))
    assert may_skip_next(a_request(next_step=9, skip_steps=1, **told))
    assert not may_skip_next(a_request(next_step=10, skip_steps=1, **told))
    assert may_skip_next(a_request(next_step=10, skip_steps=2, **told))


def test_nothing_is_skipped_that_no_worker_would_skip() -> None:
    assert not may_skip_next(a_request(guidance_skip="off", last_full=8, done_step=8, next_step=9))
    # A sampler with more forwards than steps.
    assert may_skip_at(num_forwards=26) == []
    # Nothing is extrapolated from a single full step.
    assert not may_skip_next(a_request(last_full=0, done_step=0, next_step=1))
    # Nothing is known of a request that comes from another worker.
    assert not may_skip_next(a_request(last_full=-1, done_step=8, next_step=8))


@pytest.mark.parametrize("policy", ["synerdiff", "continuous-parallel-with-skip"])
def test_a_request_s_budget_is_used_and_kept_though_its_worker_would_skip_more(policy: str) -> None:
    level = SkipLevel(rows_saved=0.1, psnr_mean_db=40.0, psnr_p5_db=35.0)
    short = profile_in_short(make_worker("unet", "u", "u"), ())
    profile = replace(short, source="measured", skip_levels={"fast": level})
    world = World(policy=policy, profiles=(profile,))
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    for number in range(6):
        world.submit(make_request(f"r{number}", steps=12, guidance_skip="fast"))
    world.run_until_quiet()
    (unet,) = world.unets.values()
    # A fifth of twelve steps, rounded; the worker allows every other one.
    assert max(len(steps) for steps in unet.skipped.values()) == 2
