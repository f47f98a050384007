"""Where a decode's latents come from: the producer's pool, or their copy in Redis."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from redis.asyncio import Redis

from shared import metrics
from shared.errors import HandleLostError
from shared.logs import get_logger
from shared.messages import DecodeLatents, TensorHandle
from shared.tensors.reader import TensorReader
from shared.tensors.wire import unpack_tensor
from shared.watchdog import Patience, Watchdog
from shared.worker import run_beside

log = get_logger()


class LatentsSource:
    """Fetches latents.

    Args:
        redis: The connection; the caller owns it.
        reader: Of the pools on this host.
        watchdog: Watches over every read of a pool.
        patience: How long one may take.
    """

    def __init__(
        self, redis: Redis, reader: TensorReader, watchdog: Watchdog, patience: Patience
    ) -> None:
        self._redis = redis
        self._reader = reader
        self._watchdog = watchdog
        self._patience = patience

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
                latents = await run_beside(
                    self._watchdog,
                    "a read of latents",
                    partial(self._reader.read, handle),
                    within_s=self._patience.within_s(),
                )
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
