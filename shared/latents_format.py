"""The format of a model's latents, as the configuration of its VAE states it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError
from shared.model_folder import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentsFormat:
    """What latents are to the VAE that decodes them: `latents / scaling_factor + shift_factor`."""

    channels: int

    vae_scale_factor: int
    """Pixels of a picture's side for one of the latents'."""

    scaling_factor: float
    shift_factor: float

    needs_float32: bool
    """Whether the VAE overflows in float16 (diffusers' `force_upcast`)."""


def read_latents_format(folder: Path) -> LatentsFormat:
    """Return the format of the latents of a diffusers folder.

    Raises:
        ConfigurationError: The folder has no configuration of a VAE, or one that lacks a field.
    """
    path = folder / "vae" / "config.json"
    try:
        return parse_latents_format(read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{path} should describe a VAE that can be served: {error!r}"
        ) from error


def parse_latents_format(config: Mapping[str, Any]) -> LatentsFormat:
    """Return the format of the latents of a VAE with this configuration.

    Fields that older configurations lack have the value that diffusers gives them, but for
    `force_upcast`: it came with SDXL, and no VAE before that needs float32.

    Raises:
        KeyError, TypeError, ValueError: A field is missing or no number.
    """
    tiny_widths = config.get("decoder_block_out_channels")
    widths = tiny_widths or config["block_out_channels"]
    return LatentsFormat(
        channels=int(config.get("latent_channels", 4)),
        vae_scale_factor=int(2 ** (len(widths) - 1)),
        scaling_factor=float(config.get("scaling_factor", 1.0 if tiny_widths else 0.18215)),
        shift_factor=float(config.get("shift_factor") or 0.0),
        needs_float32=bool(config.get("force_upcast", False)),
    )
