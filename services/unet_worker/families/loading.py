"""Chooses the family of a diffusers folder and loads it, less its VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import transformers

from services.unet_worker.families.latent_consistency import LatentConsistency
from services.unet_worker.families.protocol import Family
from services.unet_worker.families.stable_diffusion import StableDiffusion
from shared.device import DtypeName, choose_device, choose_dtype
from shared.errors import ConfigurationError
from shared.latents_format import read_json, read_latents_format

PIPELINES = {
    "StableDiffusionPipeline": diffusers.StableDiffusionPipeline,
    "LatentConsistencyModelPipeline": diffusers.LatentConsistencyModelPipeline,
}
"""What `model_index.json` may name."""


def load_family(folder: Path | str, *, device: str = "auto", dtype: DtypeName = "auto") -> Family:
    """Return the loaded model of a diffusers folder, without its VAE.

    Args:
        folder: What a pipeline's `save_pretrained` writes; nothing is downloaded.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        dtype: Of the network and the text encoder, as `choose_dtype` takes it.

    Raises:
        ConfigurationError: The folder is of no known family, or the device is not there.
    """
    folder = Path(folder)
    pipeline_class = _choose_pipeline(folder)
    latents_format = read_latents_format(folder)
    takes_scale = read_json(folder / "unet" / "config.json").get("time_cond_proj_dim")
    is_consistency = pipeline_class is diffusers.LatentConsistencyModelPipeline or takes_scale
    family = LatentConsistency if is_consistency else StableDiffusion
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    diffusers.utils.logging.set_verbosity_error()  # schedulers comment on every step otherwise
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipeline = pipeline_class.from_pretrained(
            folder,
            vae=None,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigurationError(f"model folder {folder} can't be loaded: {error}") from error
    return family(pipeline, latents_format, device=torch_device, dtype=torch_dtype)


def _choose_pipeline(folder: Path) -> Any:
    name = read_json(folder / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise ConfigurationError(
            f"{folder / 'model_index.json'} names the pipeline {name!r}; "
            f"it should be {' or '.join(PIPELINES)}"
        )
    return PIPELINES[name]
