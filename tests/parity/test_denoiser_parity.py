"""The batched denoiser against `StableDiffusionPipeline`, picture by picture."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from denoising import (
    ATTEMPT,
    Reference,
    denoise_alone,
    denoise_held,
    make_denoiser,
    next_rows,
    parameters,
)
from tiny_model import make_tiny_model

from services.unet_worker.denoising.denoiser import Denoiser
from services.unet_worker.denoising.samplers import SAMPLERS
from shared.errors import InvalidRequestError
from shared.messages import ImageParameters

ONE_LEVEL = 1 / 255
FALLBACKS = ("PNDMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler")


@pytest.fixture(
    scope="module", params=["epsilon, f8", "v_prediction, f4, linear projection, DDIM config"]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    if request.param.startswith("epsilon"):
        return make_tiny_model(path)
    return make_tiny_model(
        path,
        prediction_type="v_prediction",
        vae_scale_factor=4,
        latent_channels=8,
        use_linear_projection=True,
        scheduler_class="DDIMScheduler",
        seed=3,
    )


@pytest.fixture(scope="module")
def denoiser(folder: Path) -> Denoiser:
    return make_denoiser(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def _random_request(chance: random.Random, sampler: str) -> ImageParameters:
    return parameters(
        prompt=chance.choice(["a red cat", "the blue dog of the moon", "", "sun, " * 20]),
        negative_prompt=chance.choice(["", "", "a face", "tree"]),
        seed=chance.randrange(2**32),
        height=chance.choice([32, 32, 48]),
        width=chance.choice([32, 32, 40]),
        num_inference_steps=chance.choice([1, 2, 3, 5, 8, 12, 30]),
        guidance_scale=chance.choice([0.0, 1.0, 1.5, 5.0, 7.5, 12.0]),
        sampler=sampler,
    )


def _difference(reference: Reference, latents: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference.picture(latents) - reference.picture(other)).abs().max())


def test_requests_that_arrive_at_random_moments_get_the_pipelines_pictures(
    denoiser: Denoiser, reference: Reference
) -> None:
    chance = random.Random(7)
    is_epsilon = reference.scheduler("default").config.prediction_type == "epsilon"
    samplers = [*SAMPLERS, "default", *(FALLBACKS if is_epsilon else ())]
    waiting = {
        f"r{i}": _random_request(chance, samplers[i % len(samplers)])
        for i in range(34 if is_epsilon else 14)
    }
    requests = dict(waiting)
    finished: dict[str, torch.Tensor] = {}
    most_rows = 0
    while waiting or denoiser.held():
        while waiting and len(denoiser.held()) < 12 and chance.random() < 0.6:
            request_id = next(iter(waiting))
            denoiser.admit(request_id, ATTEMPT, waiting.pop(request_id))
        rows = [row for row in next_rows(denoiser) if chance.random() < 0.8]
        chance.shuffle(rows)
        result = denoiser.run(rows)
        denoiser.draw_ahead()
        most_rows = max(most_rows, result.num_unet_rows)
        finished |= {one.request_id: one.latents for one in result.finished}

    assert most_rows >= 6
    assert finished.keys() == requests.keys()
    for request_id, request in requests.items():
        difference = _difference(reference, finished[request_id], reference.latents(request))
        assert difference < ONE_LEVEL, (request, difference)


def test_every_sampler_on_offer_equals_the_pipelines_and_refuses_what_fails_there(
    denoiser: Denoiser, reference: Reference
) -> None:
    for sampler in denoiser.samplers.names:
        for num_steps in (1, 5):
            request = parameters(
                sampler=sampler, num_inference_steps=num_steps, height=32, width=32
            )
            try:
                latents = denoise_alone(denoiser, request).latents
            except InvalidRequestError:
                with pytest.raises((ValueError, IndexError, RuntimeError)):
                    reference.latents(request)
                continue
            difference = _difference(reference, latents, reference.latents(request))
            assert difference < ONE_LEVEL, (sampler, num_steps, difference)


def test_a_request_looks_the_same_alone_and_in_a_full_batch(
    denoiser: Denoiser, reference: Reference
) -> None:
    requests = {
        f"r{i}": parameters(
            prompt=f"a {'red' if i % 2 else 'blue'} cat",
            seed=i,
            num_inference_steps=3 + i,
            guidance_scale=1.0 + i % 4 * 3,
            sampler=sampler,
            height=32,
            width=32,
        )
        for i, sampler in enumerate([*SAMPLERS, *FALLBACKS])
    }
    for request_id, request in requests.items():
        denoiser.admit(request_id, ATTEMPT, request)
    together = denoise_held(denoiser)
    for request_id, request in requests.items():
        alone = denoise_alone(denoiser, request).latents
        assert _difference(reference, together[request_id].latents, alone) < ONE_LEVEL / 10


def test_images_of_consecutive_seeds_equal_the_pipeline_with_a_list_of_generators(
    denoiser: Denoiser, reference: Reference
) -> None:
    request = parameters(sampler="euler_a", height=32, width=32)
    for seed in range(3):
        denoiser.admit(
            f"r{seed}", ATTEMPT, parameters(sampler="euler_a", height=32, width=32, seed=seed)
        )
    finished = denoise_held(denoiser)
    reference.pipeline.scheduler = reference.scheduler("euler_a")
    expected = reference.pipeline(
        [request.prompt] * 3,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
        output_type="latent",
    ).images
    for seed in range(3):
        latents = finished[f"r{seed}"].latents
        assert _difference(reference, latents, expected[seed : seed + 1]) < ONE_LEVEL


def test_a_unet_that_takes_the_guidance_scale_as_input_needs_no_negative_rows(
    tmp_path: Path,
) -> None:
    folder = make_tiny_model(tmp_path, time_cond_proj_dim=16, scheduler_class="LCMScheduler")
    denoiser, reference = make_denoiser(folder), Reference(folder)
    request = parameters(sampler="default", num_inference_steps=4, guidance_scale=8.0)
    assert not denoiser.admit("a", ATTEMPT, request).is_guided
    latents = denoise_held(denoiser)["a"].latents
    assert _difference(reference, latents, reference.latents(request)) < ONE_LEVEL
    other = denoise_alone(denoiser, parameters(sampler="default", num_inference_steps=4))
    assert _difference(reference, latents, other.latents) > ONE_LEVEL
