"""Times a decoder's chunks, without any request."""

from __future__ import annotations

import statistics
import time

import torch

from services.vae_worker.decoding import ChunkPlan, decode_chunks
from services.vae_worker.model import Decoder
from shared.device import finish_work
from shared.worker import sample_for


def time_chunks(decoder: Decoder, plan: ChunkPlan) -> tuple[float, ...]:
    """Return the seconds of each chunk of one decode of dummy latents."""
    shape = (1, decoder.latent_channels, plan.latent_height, plan.latent_width)
    latents = torch.zeros(shape, device=decoder.device, dtype=decoder.dtype)
    chunks = decode_chunks(decoder.vae, latents, plan=plan)
    durations_s = []
    for _ in range(plan.num_chunks):
        started_at = time.perf_counter()
        next(chunks, None)
        finish_work(decoder.device)
        durations_s.append(time.perf_counter() - started_at)
    return tuple(durations_s)


def measure_for(decoder: Decoder, plan: ChunkPlan, window_s: float) -> tuple[float, ...]:
    """Return the median milliseconds of each chunk, of decodes one after another for so long."""
    decodes = sample_for(window_s, lambda: time_chunks(decoder, plan))
    return tuple(statistics.median(durations_s) * 1e3 for durations_s in zip(*decodes, strict=True))
