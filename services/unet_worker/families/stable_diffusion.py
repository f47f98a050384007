"""Stable Diffusion 1.x and 2.x, predicting noise (epsilon) or velocity (v)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from services.unet_worker.families.prompt_encoder import PromptEncoder
from services.unet_worker.families.protocol import (
    Conditions,
    ConditionSpec,
    Encoding,
    InitialState,
    ModelFacts,
)
from services.unet_worker.families.vocabulary import Vocabulary, unknown_word_warnings
from shared.errors import ConfigurationError
from shared.latents_format import LatentsFormat
from shared.messages import ImageParameters

_SIDE_MULTIPLE = 8  # what StableDiffusionPipeline.check_inputs asks of every side
_UNSUPPORTED_UNET_FIELDS = ("class_embed_type", "encoder_hid_dim_type", "num_class_embeds")


class StableDiffusion:
    """A `StableDiffusionPipeline` without its VAE; the attributes are those of `Family`.

    Args:
        pipeline: On the CPU, as `load_family` loads it.
        latents_format: Of the folder's VAE.
        vocabulary: The words that the model knows, None where its folder does not say.
        device: Where to compute.
        dtype: What to compute in.

    Raises:
        ConfigurationError: The folder's parts don't fit each other, or need inputs that the
            pipeline does not supply.
    """

    def __init__(
        self,
        pipeline: Any,
        latents_format: LatentsFormat,
        *,
        vocabulary: Vocabulary | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        _check_parts(pipeline, latents_format)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device, dtype)
        pipeline.text_encoder.eval().requires_grad_(False)
        self.pipeline = pipeline
        self.unet = pipeline.unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.network: torch.nn.Module = UnetNetwork(self.unet)
        self.noise_scheduler = pipeline.scheduler
        self.prompt_encoder = PromptEncoder(pipeline, device=device)
        self.vocabulary = vocabulary
        self.latents_format = latents_format
        self.facts = _read_facts(pipeline, latents_format)
        self.device = device
        self.dtype = dtype
        tokens = pipeline.tokenizer.model_max_length
        width = pipeline.text_encoder.config.hidden_size
        self.conditions: Mapping[str, ConditionSpec] = {
            "prompt_embeds": ConditionSpec(shape=(tokens, width), dtype=dtype)
        }

    def is_guided(self, parameters: ImageParameters) -> bool:
        """Return whether a step needs a negative row, as the pipeline decides it."""
        return parameters.guidance_scale > 1

    def encode(self, parameters: ImageParameters) -> Encoding:
        """Return the prompts' embeddings, with warnings of what the model can't see in them."""
        prompts = {"prompt": parameters.prompt}
        if self.is_guided(parameters):
            prompts["negative_prompt"] = parameters.negative_prompt
        encoded = {name: self.prompt_encoder.encode(text) for name, text in prompts.items()}
        positive = encoded["prompt"]
        negative = encoded.get("negative_prompt", positive)
        warnings = [
            f"{name}: the last {embedding.num_dropped_tokens} tokens were dropped; "
            f"the model sees {self.facts.max_prompt_tokens}"
            for name, embedding in encoded.items()
            if embedding.num_dropped_tokens
        ]
        warnings += unknown_word_warnings(prompts, self.vocabulary)
        return Encoding(
            negative={"prompt_embeds": negative.embeds},
            positive={"prompt_embeds": positive.embeds},
            warnings=tuple(warnings),
        )

    def latents_shape(self, parameters: ImageParameters) -> tuple[int, int, int]:
        """Return (C, h, w) of the request's latents."""
        factor = self.latents_format.vae_scale_factor
        channels = self.latents_format.channels
        return channels, parameters.height // factor, parameters.width // factor

    def initial_state(
        self, parameters: ImageParameters, noise: torch.Tensor, init_noise_sigma: float
    ) -> InitialState:
        """Return the seed's noise at the sampler's first level."""
        del parameters
        return InitialState(latents=noise * init_noise_sigma, step_index=0)

    def batch_key(self, parameters: ImageParameters) -> str:
        """Return the latents' size: all prompts have the same length."""
        _, height, width = self.latents_shape(parameters)
        return f"{width}x{height}"


class UnetNetwork(torch.nn.Module):
    """A diffusers `UNet2DConditionModel` as a network of rows."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.eval()

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the UNet's output."""
        prediction: torch.Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states=conditions["prompt_embeds"],
            timestep_cond=conditions.get("timestep_cond"),
            return_dict=False,
        )[0]
        return prediction


def _check_parts(pipeline: Any, latents_format: LatentsFormat) -> None:
    unet, text = pipeline.unet.config, pipeline.text_encoder.config
    for name in _UNSUPPORTED_UNET_FIELDS:
        if unet.get(name) is not None:
            raise ConfigurationError(f"unet/config.json: {name}={unet[name]!r} should be null")
    if unet.get("addition_embed_type") not in (None, "text"):  # "text" needs the prompt only
        raise ConfigurationError(
            f"unet/config.json: addition_embed_type={unet.addition_embed_type!r} "
            "should be null or 'text'"
        )
    if not unet.in_channels == unet.out_channels == latents_format.channels:
        raise ConfigurationError(
            f"unet/config.json: in_channels={unet.in_channels} and "
            f"out_channels={unet.out_channels} should be the VAE's latent channels, "
            f"{latents_format.channels}"
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise ConfigurationError(
            f"unet/config.json: cross_attention_dim={unet.cross_attention_dim} should be "
            f"the text encoder's width of {text.hidden_size}"
        )
    if pipeline.tokenizer.model_max_length > text.max_position_embeddings:
        raise ConfigurationError(
            f"tokenizer_config.json: model_max_length={pipeline.tokenizer.model_max_length} "
            f"should be at most the text encoder's {text.max_position_embeddings} positions"
        )


def _read_facts(pipeline: Any, latents_format: LatentsFormat) -> ModelFacts:
    factor, size = latents_format.vae_scale_factor, pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return ModelFacts(
        default_height=height * factor,
        default_width=width * factor,
        side_multiple=max(factor, _SIDE_MULTIPLE),
        max_prompt_tokens=pipeline.tokenizer.model_max_length - 2,
        prediction_type=pipeline.scheduler.config.get("prediction_type", "epsilon"),
    )
