"""What the tests of the denoiser share: requests, slots, and the pipeline's own results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from image_parameters import PARAMETERS
from tiny_model import load_reference_pipeline

from services.unet_worker.backends.eager import EagerBackend
from services.unet_worker.denoising.denoiser import Denoiser, FinishedLatents
from services.unet_worker.denoising.samplers import DEFAULT_SAMPLER, SAMPLERS
from services.unet_worker.families.loading import load_family
from shared.messages import ImageParameters, SlotRow

ATTEMPT = "1-1"


def parameters(**changes: Any) -> ImageParameters:
    """A small request, with changes."""
    return replace(PARAMETERS, **changes)


def make_denoiser(folder: Path, **settings: Any) -> Denoiser:
    """A denoiser in fp32 on the CPU, its forwards as diffusers runs them."""
    family = load_family(folder, device="cpu", dtype="float32")
    return Denoiser(family, EagerBackend(family), **settings)


def next_rows(
    denoiser: Denoiser, request_ids: Sequence[str] | None = None, *, skip: bool = False
) -> list[SlotRow]:
    """The next forward of every request held, or of those named."""
    return [
        SlotRow(
            request_id=held.request_id, attempt=held.attempt, step_index=held.step_index, skip=skip
        )
        for held in denoiser.held()
        if request_ids is None or held.request_id in request_ids
    ]


def denoise_held(denoiser: Denoiser, *, skip: bool = False) -> dict[str, FinishedLatents]:
    """Run everything held, all in one batch, to the end."""
    finished: dict[str, FinishedLatents] = {}
    while denoiser.held():
        result = denoiser.run(next_rows(denoiser, skip=skip))
        assert not result.failures
        finished |= {one.request_id: one for one in result.finished}
    return finished


def denoise_alone(
    denoiser: Denoiser, request: ImageParameters, *, skip: bool = False
) -> FinishedLatents:
    """One request from beginning to end, without company."""
    denoiser.admit("alone", ATTEMPT, request)
    return denoise_held(denoiser, skip=skip)["alone"]


class Reference:
    """The folder's `StableDiffusionPipeline`, with whatever scheduler a request names."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = load_reference_pipeline(folder)
        self._own_scheduler = self.pipeline.scheduler

    def scheduler(self, sampler: str) -> Any:
        """`Cls.from_config(pipe.scheduler.config, **overrides)`."""
        own = self._own_scheduler
        if sampler == DEFAULT_SAMPLER:
            return type(own).from_config(own.config)
        class_name, overrides = SAMPLERS.get(sampler, (sampler, {}))
        return getattr(diffusers, class_name).from_config(own.config, **overrides)

    def latents(self, request: ImageParameters) -> torch.Tensor:
        """What the pipeline hands to its VAE."""
        self.pipeline.scheduler = self.scheduler(request.sampler)
        latents: torch.Tensor = self.pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            height=request.height,
            width=request.width,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
        ).images
        return latents

    @torch.inference_mode()
    def picture(self, latents: torch.Tensor) -> torch.Tensor:
        """The pipeline's picture of latents: (3, height, width) in [0, 1]."""
        vae = self.pipeline.vae
        decoded = vae.decode(latents.float() / vae.config.scaling_factor).sample
        picture: torch.Tensor = (decoded[0] / 2 + 0.5).clamp(0, 1)
        return picture
