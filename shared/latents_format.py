"""What both halves of a model must agree on about latents, as the folder's VAE says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError
from shared.model_folder import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentsFormat:
    """How a model's latents relate to what its VAE decodes: `latents / scaling + shift`."""

    channels: int
    """Of one picture's latents."""

    vae_scale_factor: int
    """Pixels of a picture's side for one of its latents'."""

    scaling_factor: float
    """What an encoder's output is multiplied by for denoising."""

    shift_factor: float = 0.0
    """What is taken from an encoder's output before that."""

    needs_float32: bool = False
    """Whether the VAE overflows in float16 (`force_upcast`)."""


def read_latents_format(folder: Path) -> LatentsFormat:
    """Return the format that `vae/config.json` of a diffusers folder describes.

    Raises:
        ConfigurationError: The file is missing, or not the configuration of a VAE.
    """
    path = folder / "vae" / "config.json"
    config = read_json(path)
    blocks = config.get("block_out_channels") or config.get("decoder_block_out_channels") or [0]
    try:
        return LatentsFormat(
            channels=int(config.get("latent_channels", 4)),
            vae_scale_factor=2 ** (len(blocks) - 1),
            scaling_factor=float(config.get("scaling_factor", _DEFAULT_SCALING[_kind(config)])),
            shift_factor=float(config.get("shift_factor") or 0.0),
            needs_float32=bool(config.get("force_upcast", False)),
        )
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} is not a VAE's configuration: {error}") from error


_DEFAULT_SCALING = {"AutoencoderKL": 0.18215, "AutoencoderTiny": 1.0}  # of diffusers' own classes


def _kind(config: dict[str, Any]) -> str:
    return "AutoencoderTiny" if config.get("_class_name") == "AutoencoderTiny" else "AutoencoderKL"
