"""Latent consistency models: few unguided steps, the guidance scale an input of the network."""

from __future__ import annotations

from typing import Any

import torch

from services.unet_worker.families.protocol import ConditionSpec, Encoding
from services.unet_worker.families.stable_diffusion import StableDiffusion
from services.unet_worker.families.vocabulary import Vocabulary
from shared.errors import ConfigurationError
from shared.latents_format import LatentsFormat
from shared.messages import ImageParameters


class LatentConsistency(StableDiffusion):
    """A `LatentConsistencyModelPipeline`, or a Stable Diffusion folder with a UNet of its kind.

    Args:
        pipeline: On the CPU, as `load_family` loads it.
        latents_format: Of the folder's VAE.
        device: Where to compute.
        dtype: What to compute in.

    Raises:
        ConfigurationError: The folder's parts don't fit each other.
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
        channels = pipeline.unet.config.time_cond_proj_dim
        if not channels:
            raise ConfigurationError(
                "unet/config.json: time_cond_proj_dim should be the guidance embedding's width"
            )
        super().__init__(
            pipeline, latents_format, vocabulary=vocabulary, device=device, dtype=dtype
        )
        self.conditions = {
            **self.conditions,
            "timestep_cond": ConditionSpec(shape=(channels,), dtype=dtype),
        }

    def is_guided(self, parameters: ImageParameters) -> bool:
        """Return False: the network is given the scale instead of two rows."""
        del parameters
        return False

    def encode(self, parameters: ImageParameters) -> Encoding:
        """Return the prompt's embedding and the guidance scale's."""
        prompt = super().encode(parameters)
        (channels,) = self.conditions["timestep_cond"].shape
        embedding: torch.Tensor = self.pipeline.get_guidance_scale_embedding(
            torch.tensor([parameters.guidance_scale - 1.0]), embedding_dim=channels
        )
        scale = {"timestep_cond": embedding[0].to(self.device, self.dtype)}
        return Encoding(
            negative={**prompt.negative, **scale},
            positive={**prompt.positive, **scale},
            warnings=prompt.warnings,
        )
