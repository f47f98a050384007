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
from shared.load_part import load_part
from shared.model_folder import check_model_folder


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoder:
    """A loaded VAE, on its device, `channels_last`.

    name: the model folder's. default_size: latent height and width of the model's usual picture.
    """

    name: str
    vae: Any
    device: torch.device
    dtype: torch.dtype
    default_size: tuple[int, int]

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that it decodes."""
        return int(self.vae.config.latent_channels)

    @property
    def scale_factor(self) -> int:
        """Pixels of a picture's side for one of its latents'."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


def load_decoder(folder: Path, *, device: str = "auto", dtype: DtypeName = "auto") -> Decoder:
    """The VAE of a `StableDiffusionPipeline` folder, for decoding; nothing is downloaded.

    Raises:
        ConfigurationError: The folder holds no such VAE, or the device is not there.
    """
    check_model_folder(folder, ("vae",))
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    diffusers.utils.logging.disable_progress_bar()
    vae = load_part(folder, "vae", diffusers.AutoencoderKL, torch_dtype)
    vae.encoder = None
    vae = vae.eval().requires_grad_(False)
    return Decoder(
        name=folder.resolve().name,
        vae=vae.to(torch_device, torch_dtype, memory_format=torch.channels_last),
        device=torch_device,
        dtype=torch_dtype,
        default_size=_read_default_size(folder / "unet" / "config.json"),
    )


def _read_default_size(unet_config: Path) -> tuple[int, int]:
    try:
        size = json.loads(unet_config.read_text())["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{unet_config} should give sample_size: {error!r}") from error
    return height, width
