"""Finished latents on their way to VAE workers: into the pool, a copy into Redis, then the word."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from redis.asyncio import Redis

from services.unet_worker.denoiser import FinishedLatents
from shared import codec, keys, metrics
from shared.logs import get_logger
from shared.messages import LatentsFinished, ReleaseLatents, TensorHandle
from shared.settings import UnetWorkerSettings
from shared.tensor_bytes import dtype_name, pack_tensor
from shared.tensor_pool import TensorPool
from shared.watchdog import Watchdog
from shared.worker import WorkerLink, run_beside

log = get_logger()


class HandOver:
    """All that is denoised and not committed. Where the pool has no room, latents wait here.

    Args:
        redis: The connection; the caller owns it.
        link: Where `LatentsFinished` goes.
        settings: Of the worker.
        pool: None hands everything over inline. The caller owns it.
        watchdog: Watches over copies into the pool.
    """

    def __init__(
        self,
        redis: Redis,
        link: WorkerLink,
        settings: UnetWorkerSettings,
        pool: TensorPool | None,
        watchdog: Watchdog,
    ) -> None:
        self._watchdog = watchdog
        self._redis = redis
        self._link = link
        self._settings = settings
        self._pool = pool
        self._finished: dict[str, FinishedLatents] = {}
        self._waiting: deque[FinishedLatents] = deque()
        self._handed_over: dict[tuple[int, int], LatentsFinished] = {}

    @property
    def is_over(self) -> bool:
        """Whether nobody needs the pool any more: every handle is committed."""
        return not self._finished and not self._handed_over

    @property
    def leaving(self) -> tuple[FinishedLatents, ...]:
        """Finished latents that nobody has been told of."""
        return tuple(self._finished.values())

    @property
    def handed_over(self) -> tuple[LatentsFinished, ...]:
        """What was said of the latents in the pool."""
        return tuple(self._handed_over.values())

    def add(self, finished: Iterable[FinishedLatents], group: asyncio.TaskGroup) -> None:
        """Hand these over, too; in the background, as far as the pool has room."""
        for one in finished:
            self._finished[one.request_id] = one
            self._waiting.append(one)
        self._hand_over_waiting(group)

    def release(self, message: ReleaseLatents, group: asyncio.TaskGroup) -> None:
        """A pool slot is free again, for the next that waits."""
        self._handed_over.pop((message.slot, message.generation), None)
        if self._pool:
            self._pool.release(message.slot, message.generation)
        self._hand_over_waiting(group)

    def forget(self, request_id: str, attempt: str) -> None:
        """Drop latents that still wait for the pool."""
        finished = self._finished.get(request_id)
        if finished and finished.attempt == attempt and finished in self._waiting:
            self._waiting.remove(finished)
            del self._finished[request_id]

    async def expire_until_stopped(self) -> None:
        """Take slots back whose time-out has passed, and show how many are used."""
        while not self._link.is_stopping:
            if self._pool:
                for handle in self._pool.expire(time.monotonic()):
                    self._handed_over.pop((handle.slot, handle.generation), None)
                    log.warning("latents expired", slot=handle.slot)
                metrics.POOL_SLOTS.labels(state="free").set(self._pool.num_free)
                num_used = self._pool.num_slots - self._pool.num_free
                metrics.POOL_SLOTS.labels(state="used").set(num_used)
            await asyncio.sleep(1.0)

    def _hand_over_waiting(self, group: asyncio.TaskGroup) -> None:
        """Hand finished latents over as far as the pool has room; the rest waits."""
        while self._waiting:
            slot = None
            if self._pool and self._waiting[0].latents.nbytes <= self._pool.slot_bytes:
                slot = self._pool.acquire()
                if slot is None:
                    return
            group.create_task(self._hand_over(self._waiting.popleft(), slot))

    async def _hand_over(self, finished: FinishedLatents, slot: int | None) -> None:
        latents = finished.latents
        inline_key = ""
        if slot is None or latents.nbytes <= self._settings.inline_copy_kb << 10:
            inline_key = keys.latents(finished.request_id, finished.attempt)
        if self._pool and slot is not None:
            publish = partial(
                self._pool.publish, slot, latents, now=time.monotonic(), inline_key=inline_key
            )
            handle = await run_beside(
                self._watchdog, "a hand-over", publish, within_s=self._settings.max_call_s
            )
        else:
            handle = TensorHandle(
                kind="inline",
                pool="",
                owner=self._link.incarnation,
                host="",
                slot=-1,
                generation=0,
                shape=tuple(latents.shape),
                dtype=dtype_name(latents.dtype),
                inline_key=inline_key,
            )
        message = LatentsFinished(
            incarnation=self._link.incarnation,
            request_id=finished.request_id,
            attempt=finished.attempt,
            handle=handle,
            skipped_steps=finished.skipped_steps,
            warnings=finished.warnings,
        )
        if inline_key:
            await self._leave_inline_copy(message, latents)
        if handle.slot >= 0:
            self._handed_over[(handle.slot, handle.generation)] = message
        del self._finished[finished.request_id]
        self._link.post(message)
        self._link.nudge()

    async def _leave_inline_copy(self, message: LatentsFinished, latents: torch.Tensor) -> None:
        """So that no worker's death costs a finished denoising."""
        key = message.handle.inline_key
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hset(key, mapping={"m": codec.encode(message), "data": pack_tensor(latents)})
            pipeline.expire(key, self._settings.latents_ttl_s)
            await cast("Any", pipeline.execute())
