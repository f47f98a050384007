"""How much memory a decode takes beyond the model, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch

from services.vae_worker.decoding import Granularity, decode_chunks, plan_chunks


@cache
def random_decoder(
    block_out_channels: tuple[int, ...], *, device: torch.device, dtype: torch.dtype, seed: int
) -> Any:
    """An `AutoencoderKL` shaped as Stable Diffusion's, with random weights, for decoding.

    Made once for each set of arguments.
    """
    num_blocks = len(block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderKL(
            block_out_channels=block_out_channels,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * num_blocks,
            up_block_types=("UpDecoderBlock2D",) * num_blocks,
        )
    vae.encoder = None
    for part in (vae.decoder, vae.post_quant_conv):
        part.to(device, dtype, memory_format=torch.channels_last)
    return vae.eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCase:
    """A decode of `pixels` x `pixels`; `granularity` None is the library's whole decode."""

    block_out_channels: tuple[int, ...]
    pixels: int
    device: torch.device
    dtype: torch.dtype
    seed: int
    granularity: Granularity | None


def peak_extra_bytes(*cases: MemoryCase) -> list[int]:
    """Peak memory of each decode, less what its process held before it.

    All at once, each in a fresh process.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(cases), mp_context=context, max_tasks_per_child=1) as pool:
        return list(pool.map(_decode_and_measure, cases))


def _decode_and_measure(case: MemoryCase) -> int:
    torch.set_num_threads(1)
    vae = random_decoder(
        case.block_out_channels, device=case.device, dtype=case.dtype, seed=case.seed
    )
    side = case.pixels // 2 ** (len(case.block_out_channels) - 1)
    latents = torch.randn(
        1, vae.config.latent_channels, side, side, device=case.device, dtype=case.dtype
    )
    with torch.inference_mode():
        vae.decode(latents[:, :, :2, :2])  # loads code and starts threads
    before = _held_bytes(case.device)
    if case.granularity is None:
        with torch.inference_mode():
            vae.decode(latents / vae.config.scaling_factor)
    else:
        plan = plan_chunks(vae, side, side, granularity=case.granularity)
        for _ in decode_chunks(vae, latents, plan=plan):
            pass
    return _peak_bytes(case.device) - before


def _held_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    resident: int = psutil.Process().memory_info().rss
    return resident


def _peak_bytes(device: torch.device) -> int:
    """The highest memory so far: `VmHWM`, since `ru_maxrss` also holds the parent's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
