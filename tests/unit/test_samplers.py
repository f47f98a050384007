"""Coefficient tables against diffusers' schedulers, and what is refused."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from services.unet_worker.denoising.coefficients import NotLinearError, read_table, step_arguments
from services.unet_worker.denoising.samplers import SAMPLERS, Samplers
from shared.errors import InvalidRequestError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _samplers(
    scheduler_class: str = "PNDMScheduler", max_steps: int = 150, **config: Any
) -> Samplers:
    scheduler = getattr(diffusers, scheduler_class)(**BETAS | config)
    return Samplers(scheduler, device=torch.device("cpu"), max_steps=max_steps)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def samplers(request: pytest.FixtureRequest) -> Samplers:
    return _samplers(prediction_type=request.param, steps_offset=1, skip_prk_steps=True)


@pytest.mark.parametrize("name", [*SAMPLERS, "HeunDiscreteScheduler", "DEISMultistepScheduler"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 14, 15, 26])
def test_a_table_steps_as_its_scheduler_does(samplers: Samplers, name: str, num_steps: int) -> None:
    table = samplers.table(name, num_steps)
    scheduler = samplers.instance(name, num_steps)
    assert table.is_linear
    assert table.num_forwards == len(scheduler.timesteps)
    assert table.init_noise_sigma == float(scheduler.init_noise_sigma)
    inputs, ours, theirs = (torch.Generator().manual_seed(seed) for seed in (0, 1, 1))
    x = torch.randn(1, 4, 8, 8, generator=inputs) * table.init_noise_sigma
    expected, carry = x, torch.zeros_like(x)
    for i, timestep in enumerate(scheduler.timesteps):
        own_timestep, input_scale, a, b, d, e, f = table.rows[i]
        assert own_timestep == timestep
        scaled = scheduler.scale_model_input(expected, timestep)
        torch.testing.assert_close(x * input_scale, scaled, rtol=1e-4, atol=1e-4)
        eps = torch.randn(x.shape, generator=inputs)
        stepped = a * x + b * eps + carry
        if table.draws_noise[i]:
            stepped = stepped + d * torch.randn(x.shape, generator=ours)
        carry = e * x + f * eps
        arguments = step_arguments(scheduler, theirs)
        expected = scheduler.step(eps, timestep, expected, **arguments).prev_sample
        x = stepped
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_euler_ancestral_draws_at_every_step_and_lcm_at_every_step_but_the_last(
    samplers: Samplers,
) -> None:
    assert samplers.table("euler_a", 5).draws_noise == (True,) * 5
    assert samplers.table("lcm", 5).draws_noise == (True,) * 4 + (False,)
    assert not any(samplers.table("dpmpp_2m", 5).draws_noise)


def test_only_multistep_samplers_carry_anything_over(samplers: Samplers) -> None:
    for name in ("ddim", "euler", "euler_a", "lcm"):
        assert not samplers.table(name, 8).rows[:, 5:].any()
    assert samplers.table("dpmpp_2m", 8).rows[:-2, 5:].all()


def test_forwards_are_counted_not_steps(samplers: Samplers) -> None:
    assert samplers.table("PNDMScheduler", 25).num_forwards == 26
    assert samplers.table("default", 25).num_forwards == 26
    assert samplers.table("HeunDiscreteScheduler", 25).num_forwards == 49
    assert not samplers.table("PNDMScheduler", 25).is_linear
    assert not samplers.table("UniPCMultistepScheduler", 25).is_linear


def test_a_ddim_from_a_configuration_without_clip_sample_does_not_clip() -> None:
    samplers = _samplers("PNDMScheduler")
    assert diffusers.DDIMScheduler.from_config(BETAS).config.clip_sample
    assert not samplers.instance("ddim", 5).config.clip_sample
    assert samplers.table("ddim", 5).is_linear


@pytest.mark.parametrize(
    "config", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}]
)
def test_clipping_and_thresholding_are_found_out(config: dict[str, bool]) -> None:
    scheduler = diffusers.DDIMScheduler(**BETAS, **config)
    scheduler.set_timesteps(10)
    with pytest.raises(NotLinearError):
        read_table(scheduler)
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(10)
    assert read_table(scheduler).is_linear


def test_reading_a_table_touches_no_random_state() -> None:
    state = torch.get_rng_state()
    _samplers().table("euler_a", 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_zero_terminal_snr_model_gets_finite_coefficients() -> None:
    samplers = _samplers(
        "DDIMScheduler",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    for name in SAMPLERS:
        assert torch.isfinite(samplers.table(name, 10).rows).all()


def test_each_sampler_tells_its_most_steps(samplers: Samplers) -> None:
    assert samplers.max_steps["lcm"] == 50
    assert samplers.max_steps["ddim"] == 150
    assert _samplers(max_steps=1100, steps_offset=1).max_steps["ddim"] == 999


@pytest.mark.parametrize(
    ("name", "num_steps", "field", "allowed"),
    [
        ("lcm", 51, "num_inference_steps", "1 to 50"),
        ("euler", 0, "num_inference_steps", "1 to 150"),
        ("euler", 151, "num_inference_steps", "1 to 150"),
        ("plms", 20, "sampler", "ddim, euler,"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused_with_what_it_can(
    samplers: Samplers, name: str, num_steps: int, field: str, allowed: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        samplers.table(name, num_steps)
    assert caught.value.field == field
    assert allowed in str(caught.value)


def test_the_usual_names_come_first_and_the_folders_own_scheduler_has_two(
    samplers: Samplers,
) -> None:
    assert samplers.names[:7] == (*SAMPLERS, "default")
    assert "PNDMScheduler" in samplers.names
    assert "DDIMScheduler" not in samplers.names
