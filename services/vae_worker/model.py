"""Loads the VAE of a diffusers folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from shared.device import DtypeName, choose_device, choose_dtype
from shared.errors import ConfigurationError
from shared.latents_format import LatentsFormat, read_latents_format
from shared.load_part import load_part
from shared.model_folder import check_model_folder, read_json


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoder:
    """A loaded VAE, on its device, `channels_last`."""

    name: str
    """The model folder's."""

    vae: Any
    device: torch.device
    dtype: torch.dtype
    latents_format: LatentsFormat

    default_size: tuple[int, int]
    """Latent height and width of the model's usual picture."""


def load_decoder(folder: Path, *, device: str = "auto", dtype: DtypeName = "auto") -> Decoder:
    """Return the VAE of a diffusers folder, for decoding; nothing is downloaded.

    A VAE that overflows in float16 computes in float32 instead.

    Raises:
        ConfigurationError: The folder holds no VAE that can be served, or the device is not there.
    """
    check_model_folder(folder, ("vae",))
    torch_device = choose_device(device)
    latents_format = read_latents_format(folder)
    torch_dtype = choose_dtype(dtype, torch_device)
    if torch_dtype is torch.float16 and latents_format.needs_float32:
        torch_dtype = torch.float32
    diffusers.utils.logging.disable_progress_bar()
    vae = load_part(folder, "vae", _vae_class(folder), torch_dtype)
    vae.encoder = None
    vae = vae.eval().requires_grad_(False)
    return Decoder(
        name=folder.resolve().name,
        vae=vae.to(torch_device, torch_dtype, memory_format=torch.channels_last),
        device=torch_device,
        dtype=torch_dtype,
        latents_format=latents_format,
        default_size=_read_default_size(folder / "unet" / "config.json"),
    )


def _vae_class(folder: Path) -> Any:
    """Return the class that the folder names, which `check_model_folder` knows."""
    _, name = read_json(folder / "model_index.json")["vae"]
    return getattr(diffusers, name)


def _read_default_size(unet_config: Path) -> tuple[int, int]:
    try:
        size = json.loads(unet_config.read_text())["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{unet_config} should give sample_size: {error!r}") from error
    return height, width
