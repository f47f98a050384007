"""Loads a diffusers Stable Diffusion folder, less its VAE, and says what the model can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from services.unet_worker.unet_forward import UnetForward
from services.unet_worker.vocabulary import Vocabulary, read_vocabulary
from shared.device import DtypeName, choose_device, choose_dtype
from shared.errors import ConfigurationError
from shared.load_part import load_part
from shared.model_folder import check_model_folder, read_json

_PIPELINE_SIDE_MULTIPLE = 8  # what StableDiffusionPipeline.check_inputs asks of every side
_UNSUPPORTED_UNET_FIELDS = (  # conditions that StableDiffusionPipeline does not supply
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What other parts need to know about a model.

    default_height, default_width, side_multiple: pixels. max_tokens: length of a prompt embedding,
    with the two markers that begin and end every prompt. text_width: its channels.
    timestep_cond_channels: of a UNet that takes the guidance scale as an input, else 0.
    """

    latent_channels: int
    vae_scale_factor: int
    default_height: int
    default_width: int
    side_multiple: int
    max_tokens: int
    text_width: int
    timestep_cond_channels: int
    prediction_type: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DiffusionModel:
    """A loaded model.

    pipeline: diffusers' own `StableDiffusionPipeline` without its VAE: the text encoder, the
    tokenizer, and the scheduler with its configuration as the pipeline corrects it. unet: on
    `device` in `dtype`, `channels_last`. forward: calls it. vocabulary: what the model has learned,
    where its folder says so.
    """

    pipeline: Any
    unet: Any
    forward: UnetForward
    facts: ModelFacts
    device: torch.device
    dtype: torch.dtype
    vocabulary: Vocabulary | None

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Raise ConfigurationError unless each (height, width) in pixels can be generated."""
        multiple = self.facts.side_multiple
        for height, width in sizes:
            if height % multiple or width % multiple or not height * width:
                raise ConfigurationError(
                    f"a size to warm up is {width}x{height}: "
                    f"both sides must be multiples of {multiple}"
                )


def load_model(
    folder: Path | str, *, device: str = "auto", dtype: DtypeName = "auto"
) -> DiffusionModel:
    """Load the folder of a `StableDiffusionPipeline` for denoising.

    Args:
        folder: What `StableDiffusionPipeline.save_pretrained` writes; nothing is downloaded.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        dtype: Of the UNet and the text encoder. "auto": float16 on CUDA, bfloat16 on a CPU with
            instructions for it, else float32.

    Raises:
        ConfigurationError: The folder is not such a model, or the device is not there.
    """
    folder = Path(folder)
    check_model_folder(folder, ("unet", "text_encoder", "tokenizer", "scheduler"))
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    diffusers.utils.logging.set_verbosity_error()  # schedulers comment on every step otherwise
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    unet = load_part(folder, "unet", diffusers.UNet2DConditionModel, torch_dtype)
    text_encoder = load_part(folder, "text_encoder", transformers.CLIPTextModel, torch_dtype)
    try:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
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
    facts = _read_facts(folder, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(torch_device, torch_dtype)
    pipeline.text_encoder.eval().requires_grad_(False)
    unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return DiffusionModel(
        pipeline=pipeline,
        unet=unet,
        forward=UnetForward(unet),
        facts=facts,
        device=torch_device,
        dtype=torch_dtype,
        vocabulary=read_vocabulary(folder),
    )


def _read_facts(folder: Path, pipeline: Any) -> ModelFacts:
    unet, text, scheduler = (
        pipeline.unet.config,
        pipeline.text_encoder.config,
        pipeline.scheduler.config,
    )
    vae = read_json(folder / "vae" / "config.json")
    for name in _UNSUPPORTED_UNET_FIELDS:
        if unet.get(name) is not None:
            raise ConfigurationError(f"unet/config.json: {name}={unet[name]!r} should be null")
    if unet.get("addition_embed_type") not in (None, "text"):  # "text" needs the prompt only
        raise ConfigurationError(
            f"unet/config.json: addition_embed_type={unet.addition_embed_type!r} "
            "should be null or 'text'"
        )
    latent_channels = vae.get("latent_channels", 4)
    if not unet.in_channels == unet.out_channels == latent_channels:
        raise ConfigurationError(
            f"unet/config.json: in_channels={unet.in_channels} and "
            f"out_channels={unet.out_channels} should be the VAE's latent channels, "
            f"{latent_channels}"
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise ConfigurationError(
            f"unet/config.json: cross_attention_dim={unet.cross_attention_dim} should be "
            f"the text encoder's width of {text.hidden_size}"
        )
    max_tokens = pipeline.tokenizer.model_max_length
    if max_tokens > text.max_position_embeddings:
        raise ConfigurationError(
            f"tokenizer_config.json: model_max_length={max_tokens} should be at most "
            f"the text encoder's {text.max_position_embeddings} positions"
        )
    factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    sample_size = unet.sample_size
    height, width = (
        (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    )
    return ModelFacts(
        latent_channels=latent_channels,
        vae_scale_factor=factor,
        default_height=height * factor,
        default_width=width * factor,
        side_multiple=max(factor, _PIPELINE_SIDE_MULTIPLE),
        max_tokens=max_tokens,
        text_width=text.hidden_size,
        timestep_cond_channels=unet.time_cond_proj_dim or 0,
        prediction_type=scheduler.get("prediction_type", "epsilon"),
    )
