"""Checks a request against the model and prepares what it is conditioned on."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from services.unet_worker.latents import BatchKey, Conditions
from services.unet_worker.model import DiffusionModel, ModelFacts
from services.unet_worker.text_encoder import PromptEmbedding, TextEncoder
from services.unet_worker.vocabulary import unknown_word_warnings
from shared.errors import InvalidRequestError
from shared.messages import ImageParameters

_MIN_SEED, _MAX_SEED = -(2**63), 2**64 - 1  # what torch.Generator.manual_seed takes


def check_parameters(
    parameters: ImageParameters,
    facts: ModelFacts,
    *,
    max_side: int,
    skip_levels: Collection[str],
) -> None:
    """Refuse what this model can't do; samplers and steps are checked by `Samplers`.

    Raises:
        InvalidRequestError: Names the field and what it may be.
    """
    for name, side in (("height", parameters.height), ("width", parameters.width)):
        if not 0 < side <= max_side or side % facts.side_multiple:
            raise InvalidRequestError(
                f"{name}={side} is not possible.",
                field=name,
                allowed=f"multiples of {facts.side_multiple} up to {max_side}",
            )
    if not math.isfinite(parameters.guidance_scale):
        raise InvalidRequestError(
            "guidance_scale is not finite.", field="guidance_scale", allowed="finite numbers"
        )
    if not _MIN_SEED <= parameters.seed <= _MAX_SEED:
        raise InvalidRequestError(
            f"seed={parameters.seed} is out of range.",
            field="seed",
            allowed=f"{_MIN_SEED} to {_MAX_SEED}",
        )
    if parameters.guidance_skip not in skip_levels:
        raise InvalidRequestError(
            f"unknown guidance_skip {parameters.guidance_skip!r}.",
            field="guidance_skip",
            allowed=", ".join(skip_levels),
        )


def batch_key(parameters: ImageParameters, facts: ModelFacts) -> BatchKey:
    """What the request shares with those it may share a forward with."""
    return BatchKey(
        latent_height=parameters.height // facts.vae_scale_factor,
        latent_width=parameters.width // facts.vae_scale_factor,
        num_tokens=facts.max_tokens,
    )


def is_guided(parameters: ImageParameters, facts: ModelFacts) -> bool:
    """Whether a step needs a negative row, as `StableDiffusionPipeline` decides it."""
    return parameters.guidance_scale > 1 and not facts.timestep_cond_channels


@torch.inference_mode()
def make_conditions(
    parameters: ImageParameters, model: DiffusionModel, text_encoder: TextEncoder
) -> tuple[Conditions, tuple[str, ...]]:
    """The request's conditions, and warnings in words for the client."""
    if is_guided(parameters, model.facts):
        positive, negative = text_encoder.encode([parameters.prompt, parameters.negative_prompt])
    else:
        positive = negative = text_encoder.encode([parameters.prompt])[0]
    conditions = Conditions(
        negative_prompt_embeds=negative.embeds,
        prompt_embeds=positive.embeds,
        timestep_cond=_timestep_cond(parameters.guidance_scale, model),
    )
    warnings = [
        f"{name}: the last {embedding.num_dropped_tokens} tokens were dropped; "
        f"the model sees {model.facts.max_tokens - 2}"
        for name, embedding in _named(positive, negative)
        if embedding.num_dropped_tokens
    ]
    warnings += unknown_word_warnings(
        parameters, model.vocabulary, is_guided=negative is not positive
    )
    return conditions, tuple(warnings)


def _named(
    positive: PromptEmbedding, negative: PromptEmbedding
) -> list[tuple[str, PromptEmbedding]]:
    named = [("prompt", positive)]
    return named if negative is positive else [*named, ("negative_prompt", negative)]


def _timestep_cond(guidance_scale: float, model: DiffusionModel) -> torch.Tensor:
    """The guidance scale as the UNet takes it as an input (latent consistency models), or empty."""
    channels = model.facts.timestep_cond_channels
    if not channels:
        return torch.empty(0, dtype=model.dtype, device=model.device)
    embedding: torch.Tensor = model.pipeline.get_guidance_scale_embedding(
        torch.tensor([guidance_scale - 1.0]), embedding_dim=channels
    )
    return embedding[0].to(model.device, model.dtype)
