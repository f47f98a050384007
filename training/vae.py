"""The autoencoder: what it is, how it is trained, and how its latents are normalised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader knows
from diffusers import AutoencoderKL
from torch import Tensor

from training.edges import edge_steepness
from training.initialisation import start_near_identity
from training.loop import Draws, LoopSettings, train
from training.pictures import PICTURE_SIZE, to_unit_range

LATENT_CHANNELS = 8
LATENT_SIZE = 16
SCALE_FACTOR = PICTURE_SIZE // LATENT_SIZE
WHOLE_PICTURES_FROM = 0.7  # of the training; crops before that
MAX_LATENT_NOISE = 0.3  # standard deviations; latents have 1
MAX_LATENT_OFFSET = 0.3  # of a whole crop's
SHARPNESS_WINDOW = 8  # pixels
SHARPNESS_WEIGHT = 8.0
STEEPNESS_WEIGHT = 20.0
SOFTNESS_COST = 4.0
P_DRAWN = 0.7  # of a crop that the UNet has drawn, rather than one of the encoder's made noisy
CROPS = ((64, 4), (64, 4), (96, 2), (PICTURE_SIZE, 1))  # (pixels, rows) of like cost, in turn


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSettings:
    """How long and how hard the autoencoder learns; a step sees about one picture's pixels."""

    steps: int = 6_000
    decoder_steps: int = 6_000
    peak_rate: float = 2.5e-3
    decoder_rate: float = 1e-3
    kl_weight: float = 2e-4
    seed: int = 0


def build_vae() -> AutoencoderKL:
    """Return a fresh f8 autoencoder with eight latent channels and a small decoder.

    Its decoder takes 2.7 GFLOP for a picture of 128x128.
    """
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=PICTURE_SIZE,
        scaling_factor=1.0,  # the normalisation is folded into the weights
        force_upcast=False,
    )
    start_near_identity(vae, branch_gain=0.1)
    return vae.to(memory_format=torch.channels_last)


def reconstruction_loss(reconstruction: Tensor, pictures: Tensor) -> Tensor:
    """L1 + L2 at three scales, and L1 of the gradients at two.

    The gradients keep edges crisp; the coarse scale gets the colours right from the start.
    """
    error = reconstruction - pictures
    half, coarse = F.avg_pool2d(error, 2), F.avg_pool2d(error, 8)
    loss = error.abs().mean() + 0.5 * half.abs().mean() + coarse.abs().mean()
    loss = loss + 5 * error.square().mean() + 5 * coarse.square().mean()
    for scale in (error, half):
        loss = loss + 0.5 * scale.diff(dim=-1).abs().mean() + 0.5 * scale.diff(dim=-2).abs().mean()
    return loss


def sharpness_loss(reconstruction: Tensor, pictures: Tensor) -> Tensor:
    """L1 of the gradients' strength in every small window, wherever in it they lie.

    Where a latent leaves open by a pixel where an edge is, any loss of single pixels is least for a
    blur; this one asks for as steep an edge as the picture's, and for none where it has none.
    """
    difference = _gradient_strength(reconstruction) - _gradient_strength(pictures)
    return difference.abs().mean()


def steepness_loss(reconstruction: Tensor, pictures: Tensor) -> Tensor:
    """L1 of the steepest gradient in every small window, which is how sharpness is measured.

    Too soft costs more than too crisp: where it is open whether there is an edge, the L1's median
    would be the softer.
    """
    steepness, wanted = (edge_steepness((images + 1) / 2) for images in (reconstruction, pictures))
    missing = wanted - steepness
    return torch.maximum(SOFTNESS_COST * missing, -missing).mean()


def _gradient_strength(pictures: Tensor) -> Tensor:
    """Root mean square of the differences between neighbours, by channel and window."""
    across = pictures.diff(dim=-1)[..., :-1, :].square()
    down = pictures.diff(dim=-2)[..., :-1].square()
    # Windows overlap by half, so that no edge lies on a border of all that see it.
    energy = F.avg_pool2d(across + down, SHARPNESS_WINDOW, stride=SHARPNESS_WINDOW // 2)
    return (energy + 1e-4).sqrt()


def train_vae(pixels: Tensor, settings: VaeSettings, checkpoint: Path) -> AutoencoderKL:
    """Train on `pixels` (N, 3, 128, 128) uint8, first on crops, in the end on whole pictures.

    The latents come out as the network likes them; `fold_normalisation` sets their scale.
    """
    torch.manual_seed(settings.seed)
    vae = build_vae()
    loop = _loop_settings(settings, settings.steps, settings.peak_rate)

    def loss_of(draws: Draws) -> Tensor:
        size, rows = _crop_of(draws.step, loop)
        corners = _corners(draws, rows, PICTURE_SIZE - size)
        pictures = torch.stack(
            [
                pixels[index, :, top : top + size, left : left + size]
                for index, (top, left) in zip(
                    draws.indices(len(pixels), rows=rows), corners, strict=True
                )
            ]
        )
        pictures = to_unit_range(pictures).to(memory_format=torch.channels_last)
        posterior = vae.encode(pictures).latent_dist
        reconstruction = vae.decode(posterior.sample(draws.generator)).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss: Tensor = reconstruction_loss(reconstruction, pictures) + settings.kl_weight * kl
        return loss

    return cast(AutoencoderKL, train(vae, loss_of, loop, checkpoint))


def train_decoder(
    vae: AutoencoderKL,
    *,
    latents: Tensor,
    drawn: Tensor,
    pixels: Tensor,
    settings: VaeSettings,
    checkpoint: Path,
) -> AutoencoderKL:
    """Go on with the decoder alone, on fixed `latents` (N, 8, 16, 16), so no UNet must relearn.

    Crops are cut from the latents of whole pictures, as they are at inference: of those that the
    UNet has `drawn` (N, 8, 16, 16) of the same pictures, and of the encoder's, made a little noisy
    and a little off as a whole, as generated ones are (their background by 0.1 to 0.3). So the
    decoder learns to keep whites white and edges sharp.
    """
    vae.requires_grad_(requires_grad=False)
    vae.decoder.requires_grad_(requires_grad=True)
    vae.post_quant_conv.requires_grad_(requires_grad=True)
    loop = _loop_settings(settings, settings.decoder_steps, settings.decoder_rate)

    def loss_of(draws: Draws) -> Tensor:
        size, rows = _crop_of(draws.step, loop)
        cells = size // SCALE_FACTOR
        crops, pictures = [], []
        for index, (top, left) in zip(
            draws.indices(len(pixels), rows=rows),
            _corners(draws, rows, LATENT_SIZE - cells),
            strict=True,
        ):
            is_drawn = draws.random.random() < P_DRAWN
            source = drawn[index] if is_drawn else _disturbed(latents[index], draws)
            crops.append(source[:, top : top + cells, left : left + cells])
            y, x = top * SCALE_FACTOR, left * SCALE_FACTOR
            pictures.append(pixels[index, :, y : y + size, x : x + size])
        batch = torch.stack(crops).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            reconstruction = vae.decode(batch).sample
        targets = to_unit_range(torch.stack(pictures))
        reconstruction = reconstruction.float()
        return (
            reconstruction_loss(reconstruction, targets)
            + SHARPNESS_WEIGHT * sharpness_loss(reconstruction, targets)
            + STEEPNESS_WEIGHT * steepness_loss(reconstruction, targets)
        )

    return cast(AutoencoderKL, train(vae, loss_of, loop, checkpoint))


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pixels: Tensor, *, rows: int = 8) -> Tensor:
    """Return the mean latents (N, 8, 16, 16) of whole pictures."""
    batches = [
        to_unit_range(pixels[first : first + rows]).to(memory_format=torch.channels_last)
        for first in range(0, len(pixels), rows)
    ]
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in batches]).contiguous()


@torch.no_grad()
def reconstruction_psnr_db(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over pictures of the PSNR (dB, peak 255) of encode and decode on whole pictures."""
    total = 0.0
    for index in range(len(pixels)):
        picture = pixels[index : index + 1]
        latents = encode_all(vae, picture)
        decoded = vae.decode(latents.to(memory_format=torch.channels_last)).sample
        restored = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
        error = (restored - picture.float()).square().mean().item()
        total += 10 * math.log10(255.0**2 / max(error, 1e-9))
    return total / len(pixels)


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Make `vae` speak latents (z - mean) / std, exactly: mean and std (C,) move into the 1x1s.

    `quant_conv` writes means and log-variances, so the log-variance drops by 2 ln(std);
    `post_quant_conv` reads the latents, so it takes the inverse.
    """
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += (post.weight * mean.view(1, -1, 1, 1)).sum(dim=(1, 2, 3))
    post.weight *= std.view(1, -1, 1, 1)


def _disturbed(latents: Tensor, draws: Draws) -> Tensor:
    """Return `latents` (8, 16, 16) with some noise, and off by a constant in each channel."""
    noise = torch.randn(latents.shape, generator=draws.generator)
    offset = torch.randn(LATENT_CHANNELS, 1, 1, generator=draws.generator)
    return (
        latents
        + MAX_LATENT_NOISE * draws.random.random() * noise
        + MAX_LATENT_OFFSET * draws.random.random() * offset
    )


def _loop_settings(settings: VaeSettings, steps: int, peak_rate: float) -> LoopSettings:
    return LoopSettings(
        steps=steps,
        peak_rate=peak_rate,
        weight_decay=1e-3,
        average_decay=0.998,
        seed=settings.seed,
    )


def _crop_of(step: int, loop: LoopSettings) -> tuple[int, int]:
    """Return the (pixels, rows) of a step's batch: whole pictures in the end."""
    return CROPS[-1] if step >= WHOLE_PICTURES_FROM * loop.steps else CROPS[step % len(CROPS)]


def _corners(draws: Draws, rows: int, last: int) -> list[tuple[int, int]]:
    """Return a random (top, left) for each row, both at most `last`."""
    return [(draws.random.randint(0, last), draws.random.randint(0, last)) for _ in range(rows)]
