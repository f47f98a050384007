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
    """A diffusers `AutoencoderKL` or `AutoencoderTiny`, without its encoder."""

    latents_format: LatentsFormat
    """What it decodes."""

    device: torch.device
    dtype: torch.dtype

    default_size: tuple[int, int]
    """Latent height and width of the model's usual picture."""

    @property
    def latent_channels(self) -> int:
        """Return the channels of the latents that it decodes."""
        return self.latents_format.channels

    @property
    def scale_factor(self) -> int:
        """Return the pixels of a picture's side for one of its latents'."""
        return self.latents_format.vae_scale_factor


def load_decoder(folder: Path, *, device: str = "auto", dtype: DtypeName = "auto") -> Decoder:
    """Return the VAE of a diffusers folder, for decoding; nothing is downloaded.

    Raises:
        ConfigurationError: The folder holds no such VAE, or the device is not there.
    """
    check_model_folder(folder, ("vae",))
    torch_device = choose_device(device)
    latents_format = read_latents_format(folder)
    torch_dtype = choose_vae_dtype(dtype, torch_device, latents_format)
    diffusers.utils.logging.disable_progress_bar()
    is_tiny = read_json(folder / "vae" / "config.json").get("_class_name") == "AutoencoderTiny"
    kind = diffusers.AutoencoderTiny if is_tiny else diffusers.AutoencoderKL
    vae = load_part(folder, "vae", kind, torch_dtype)
    vae.encoder = None
    vae = vae.eval().requires_grad_(False)
    return Decoder(
        name=folder.resolve().name,
        vae=vae.to(torch_device, torch_dtype, memory_format=torch.channels_last),
        latents_format=latents_format,
        device=torch_device,
        dtype=torch_dtype,
        default_size=_read_default_size(folder / "unet" / "config.json"),
    )


def choose_vae_dtype(
    name: DtypeName, device: torch.device, latents_format: LatentsFormat
) -> torch.dtype:
    """Return what the VAE computes in: what `name` means, or float32 where the model asks for it.

    A VAE with `force_upcast` overflows in float16. bfloat16 has the range, so a CPU's choice and
    one that was named stand; a GPU's own choice gives way, since what that VAE was made for is
    float32 and a GPU has the memory.

    Raises:
        ConfigurationError: No such dtype.
    """
    dtype = choose_dtype(name, device)
    is_free = name == "auto" and device.type == "cuda"
    if latents_format.needs_float32 and (dtype == torch.float16 or is_free):
        return torch.float32
    return dtype


def _read_default_size(unet_config: Path) -> tuple[int, int]:
    try:
        size = json.loads(unet_config.read_text())["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{unet_config} should give sample_size: {error!r}") from error
    return height, width
