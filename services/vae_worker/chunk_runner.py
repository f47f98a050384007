"""Runs the chunks of a grant in a compute thread."""

from __future__ import annotations

import time

import torch

from services.vae_worker.decode_queue import Decode, PendingGrant
from services.vae_worker.decoding import ChunkPlan, Granularity, decode_chunks, plan_chunks
from services.vae_worker.model import Decoder
from services.vae_worker.unet_beside import UnetBeside
from shared.device import finish_work

MAX_PLANS = 64
"""How sizes are cut that were decoded lately; clients choose sizes, and there are thousands."""


class ChunkRunner:
    """Runs decodes by grants; its methods may be called by several compute threads.

    Args:
        decoder: Decodes.
        granularity: How finely its decodes are cut.
        beside: Is told while chunks run.
    """

    def __init__(self, decoder: Decoder, granularity: Granularity, beside: UnetBeside) -> None:
        self._decoder = decoder
        self._granularity = granularity
        self._beside = beside
        self._plans: dict[tuple[int, int], ChunkPlan] = {}

    def plan(self, latent_height: int, latent_width: int) -> ChunkPlan:
        """Return how a decode of that size is cut."""
        size = (latent_height, latent_width)
        plan = self._plans.pop(size, None) or plan_chunks(
            self._decoder.vae, latent_height, latent_width, granularity=self._granularity
        )
        self._plans[size] = plan  # the most recently used comes last
        if len(self._plans) > MAX_PLANS:
            del self._plans[next(iter(self._plans))]
        return plan

    def begin(self, decode: Decode, latents: torch.Tensor) -> None:
        """Give a decode its latents; nothing is computed yet."""
        plan = self.plan(latents.shape[2], latents.shape[3])
        latents = latents.to(self._decoder.device, self._decoder.dtype)
        decode.num_chunks = plan.num_chunks
        decode.chunks = decode_chunks(self._decoder.vae, latents, plan=plan)

    def run(self, decode: Decode, *, share: float) -> torch.Tensor | None:
        """Run the chunks of a decode's oldest grant; return the image once all have run.

        Stops at the next chunk if the decode is dropped.

        Args:
            decode: Has begun, and nobody else runs it.
            share: Of the threads granted, that which it has.
        """
        grant = decode.grants[0]
        while grant.left and not decode.is_dropped:
            image = self._run_chunk(decode, grant, share)
            if image is not None:
                return image
        return None

    def _run_chunk(self, decode: Decode, grant: PendingGrant, share: float) -> torch.Tensor | None:
        assert decode.chunks is not None
        is_last = False
        started_at = time.perf_counter()
        self._beside.begin_chunk(grant.command)
        try:
            next(decode.chunks)
            finish_work(self._decoder.device)
        except StopIteration as end:
            is_last = True
            image: torch.Tensor = end.value
            return image.float().cpu()
        finally:
            duration_s = time.perf_counter() - started_at
            grant.left -= 1
            grant.device_s += duration_s * share
            decode.num_done += 1
            decode.compute_s += duration_s
            decode.device_s += duration_s * share
            self._beside.end_chunk(grant.command, is_last=is_last)
        return None
