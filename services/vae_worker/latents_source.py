"""Where a decode's latents come from: the producer's pool, or their copy in Redis."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import torch
from redis.asyncio import Redis

from shared import metrics
from shared.errors import HandleLostError
from shared.logs import get_logger
from shared.messages import DecodeLatents, TensorHandle
from shared.tensor_bytes import unpack_tensor
from shared.tensor_pool import TensorReader

log = get_logger()


class LatentsSource:
    """Fetches latents.

    Args:
        redis: The connection; the caller owns it.
        reader: Of the pools on this host.
    """

    def __init__(self, redis: Redis, reader: TensorReader) -> None:
        self._redis = redis
        self._reader = reader

    async def fetch(self, command: DecodeLatents) -> tuple[torch.Tensor, str]:
        """Return the latents, and the transport that served.

        Raises:
            HandleLostError: Neither the pool nor an inline copy has them.
        """
        handle, transport = command.handle, command.transport
        try:
            if transport == "inline":
                latents = await self._fetch_inline(handle)
            else:
                latents = await asyncio.to_thread(self._reader.read, handle)
        except HandleLostError as error:
            if transport == "inline":
                raise
            log.warning("falls back on the inline copy", reason=str(error), transport=transport)
            latents, transport = await self._fetch_inline(handle), "inline"
        metrics.TRANSFERS.labels(transport=transport).inc()
        return latents, transport

    async def _fetch_inline(self, handle: TensorHandle) -> torch.Tensor:
        payload = await cast("Any", self._redis.hget(handle.inline_key, "data"))
        if payload is None:
            raise HandleLostError("neither the pool nor an inline copy holds the latents")
        return unpack_tensor(payload, handle.shape, handle.dtype)
