"""Chooses the family of a diffusers folder and loads it, less its VAE."""

from __future__ import annotations

from pathlib import Path

import diffusers
import transformers

from services.unet_worker.families.latent_consistency import LatentConsistency
from services.unet_worker.families.protocol import Family
from services.unet_worker.families.stable_diffusion import StableDiffusion
from services.unet_worker.families.vocabulary import read_vocabulary
from shared.device import DtypeName, choose_device, choose_dtype
from shared.errors import ConfigurationError
from shared.latents_format import read_latents_format
from shared.load_part import load_part
from shared.model_folder import PIPELINE_CLASSES, check_model_folder, read_json

PIPELINES = {name: getattr(diffusers, name) for name in PIPELINE_CLASSES}
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
    check_model_folder(folder, ("unet", "text_encoder", "tokenizer", "scheduler"))
    pipeline_class = PIPELINES[read_json(folder / "model_index.json")["_class_name"]]
    latents_format = read_latents_format(folder)
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    diffusers.utils.logging.set_verbosity_error()  # schedulers comment on every step otherwise
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    unet = load_part(folder, "unet", diffusers.UNet2DConditionModel, torch_dtype)
    text_encoder = load_part(folder, "text_encoder", transformers.CLIPTextModel, torch_dtype)
    try:
        pipeline = pipeline_class.from_pretrained(
            folder,
            unet=unet,
            text_encoder=text_encoder,
            vae=None,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigurationError(f"model folder {folder} can't be loaded: {error}") from error
    takes_scale = unet.config.time_cond_proj_dim is not None
    is_consistency = takes_scale or pipeline_class is diffusers.LatentConsistencyModelPipeline
    family = LatentConsistency if is_consistency else StableDiffusion
    return family(
        pipeline,
        latents_format,
        vocabulary=read_vocabulary(folder),
        device=torch_device,
        dtype=torch_dtype,
    )
