"""A tiny Stable Diffusion folder with random weights: every part is real, none is large.

`make_tiny_model` writes in about a second a folder that `StableDiffusionPipeline.from_pretrained`
loads. The weights are drawn from a fixed seed, so two folders with the same arguments are equal.
Pictures made with it are noise, but they depend on the prompt, the seed and the guidance scale.
"""

from __future__ import annotations

import inspect
import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENIZER_MAX_LENGTH = 16
TEXT_WIDTH = 32
WORDS = ("cat", "dog", "red", "blue", "heart", "sun", "moon", "face", "tree", "a", "of", "the")


def make_tiny_model(
    path: Path | str,
    *,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    use_linear_projection: bool = False,
    time_cond_proj_dim: int | None = None,
    vae_scale_factor: Literal[2, 4, 8] = 8,
    latent_channels: int = 4,
    sample_size: int = 8,
    scheduler_class: type[Any] | str = PNDMScheduler,
    scheduler_config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a tiny random diffusers folder to `path` and return it.

    `time_cond_proj_dim` makes the UNet take the guidance scale as an input, as latent consistency
    models do.

    `sample_size` is the UNet's default latent height and width; the default picture is
    `sample_size * vae_scale_factor` pixels. The scheduler is configured as in Stable Diffusion 1.x
    (PNDM with `skip_prk_steps`, `steps_offset` 1) unless `scheduler_class` (a class or its name)
    and `scheduler_config` say otherwise; the latter is merged over that configuration.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(scheduler_class, str):
        scheduler_class = getattr(diffusers, scheduler_class)
    tokenizer = _make_tokenizer(path / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            tokenizer=tokenizer,
            text_encoder=_make_text_encoder(tokenizer),
            unet=_make_unet(
                latent_channels, sample_size, use_linear_projection, time_cond_proj_dim
            ),
            vae=_make_vae(latent_channels, vae_scale_factor, sample_size),
            scheduler=_make_scheduler(scheduler_class, prediction_type, scheduler_config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(path)
    return path


def load_reference_pipeline(path: Path | str) -> Any:
    """The folder's own `StableDiffusionPipeline`, fp32 on the CPU: what results must equal."""
    pipeline = StableDiffusionPipeline.from_pretrained(path, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _make_tokenizer(path: Path) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer that knows the letters and a few whole words."""
    characters = list(string.ascii_lowercase + string.digits + string.punctuation)
    vocabulary = characters + [f"{character}</w>" for character in characters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            pieces[:2] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
            if pieces[0] not in vocabulary:
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    path.mkdir(parents=True, exist_ok=True)
    vocabulary_path, merges_path = path / "vocab.json", path / "merges.txt"
    vocabulary_path.write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    merges_path.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": TOKENIZER_MAX_LENGTH, "tokenizer_class": "CLIPTokenizer"})
    )
    return CLIPTokenizer.from_pretrained(path)


def _make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENIZER_MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        initializer_factor=8.0,  # distinct prompts, distinct embeddings
    )
    return CLIPTextModel(config).eval()


def _make_unet(
    latent_channels: int,
    sample_size: int,
    use_linear_projection: bool,
    time_cond_proj_dim: int | None,
) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        use_linear_projection=use_linear_projection,
        time_cond_proj_dim=time_cond_proj_dim,
    ).eval()
    sample = torch.randn(4, latent_channels, sample_size, sample_size)
    embeds = torch.randn(4, TOKENIZER_MAX_LENGTH, TEXT_WIDTH)
    with torch.no_grad():  # outputs of the size of noise, as a trained model's are
        unet.conv_out.weight /= unet(sample, 500, embeds).sample.std()
    return unet


def _make_vae(latent_channels: int, vae_scale_factor: int, sample_size: int) -> AutoencoderKL:
    num_blocks = vae_scale_factor.bit_length()
    return AutoencoderKL(
        sample_size=sample_size * vae_scale_factor,
        latent_channels=latent_channels,
        block_out_channels=(8, 16, 16, 16)[:num_blocks],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
    ).eval()


def _make_scheduler(
    scheduler_class: type[Any], prediction_type: str, overrides: Mapping[str, Any] | None
) -> Any:
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    known = inspect.signature(scheduler_class).parameters
    return scheduler_class(
        **{key: value for key, value in config.items() if key in known} | dict(overrides or {})
    )
