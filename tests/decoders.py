"""Random decoders for tests: real `AutoencoderKL`s, small enough to decode in milliseconds."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor


def make_vae(
    block_out_channels: Sequence[int] = (8, 16, 16),
    *,
    layers_per_block: int = 1,
    latent_channels: int = 4,
    norm_num_groups: int = 4,
    up_block_type: str = "UpDecoderBlock2D",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    seed: int = 0,
    **config: Any,
) -> Any:
    """A VAE for decoding, whose norms have weights and biases that matter."""
    num_blocks = len(block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            down_block_types=("DownEncoderBlock2D",) * num_blocks,
            up_block_types=(up_block_type,) * num_blocks,
            **config,
        )
        for name, parameter in vae.decoder.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter.data, mean=float(name.endswith("weight")), std=0.3)
    vae.encoder = None
    vae = vae.eval().requires_grad_(requires_grad=False)
    # module by module: diffusers warns about casts of whole models
    for part in (vae.decoder, vae.post_quant_conv):
        if part is not None:
            part.to(dtype=dtype, memory_format=memory_format)
    return vae


def make_tiny_vae(
    *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> AutoencoderTiny:
    """A random `AutoencoderTiny` for decoding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = (8, 8, 8)
        vae = AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(2, 1, 1),
            **config,
        )
    vae = vae.eval().requires_grad_(requires_grad=False)
    vae.decoder.to(dtype=dtype, memory_format=torch.channels_last)
    return vae


def make_latents(
    vae: Any, latent_height: int, latent_width: int, *, batch: int = 1, seed: int = 0
) -> Tensor:
    """Latents of the VAE's dtype as a denoising loop leaves them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, vae.config.latent_channels, latent_height, latent_width)
    latents = torch.randn(shape, generator=generator) * vae.config.scaling_factor
    return latents.to(next(vae.decoder.parameters()).dtype)


def whole_decode(vae: Any, latents: Tensor) -> Tensor:
    """What diffusers' pipelines do with latents."""
    config = vae.config
    with torch.inference_mode():
        scaled = latents / config.scaling_factor
        if config.shift_factor:
            scaled = scaled + config.shift_factor
        image: Tensor = vae.decode(scaled, return_dict=False)[0]
    return image


def finish(chunks: Generator[int, None, Tensor]) -> Tensor:
    """Run a decode to its end."""
    while True:
        try:
            next(chunks)
        except StopIteration as end:
            image: Tensor = end.value
            return image


def relative_difference(image: Tensor, reference: Tensor) -> float:
    """max|a - b| / max|b|."""
    reference = reference.double()
    return float((image.double() - reference).abs().max() / reference.abs().max())


def noise_db(image: Tensor, reference: Tensor) -> float:
    """Mean squared distance from the reference, in dB; lower is nearer."""
    return float(10 * (image.double() - reference.double()).square().mean().log10())
