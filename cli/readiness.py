"""Watches a stack come up: who has announced itself, and whether pictures can be made."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Final, Self, cast

from redis import RedisError
from redis.asyncio import Redis

from launch.stack import Stack
from shared import codec
from shared.errors import ProtocolError
from shared.messages import WorkerInfo
from shared.store import keys
from shared.store.registrations import readable_workers

_POLL_S: Final = 0.2
_HTTP_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A service is up."""

    service: str
    detail: str
    """What there is to say about it."""


async def http_status(address: tuple[str, int], path: str) -> int | None:
    """Return the status with which GET `path` is answered, None if nobody answers."""
    try:
        async with asyncio.timeout(_HTTP_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(*address)
            try:
                host = address[0]
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
                words = (await reader.readline()).split()
                return int(words[1])
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError, ValueError, IndexError):
        return None


class StartWatch:
    """Tells the services of a stack that is starting from those of an earlier run.

    Made by `begin` before the stack's services start: what Redis names then is an earlier run's.
    """

    def __init__(self, redis: Redis, stack: Stack, *, old: frozenset[str], old_epoch: int) -> None:
        self._redis = redis
        self._stack = stack
        self._old = old
        self._old_epoch = old_epoch

    @classmethod
    async def begin(cls, redis: Redis, stack: Stack) -> Self:
        """Remember who is there already, and return the watch."""
        return cls(
            redis,
            stack,
            old=await _incarnations(redis),
            old_epoch=int(await redis.get(keys.EPOCH) or 0),
        )

    async def announcements(self) -> AsyncGenerator[Announcement, None]:
        """Yield each service of the stack once, when it is up; end when pictures can be made."""
        waiting = {"gateway", "scheduler", *self._stack.unet_workers, *self._stack.vae_workers}
        while True:
            with contextlib.suppress(RedisError, OSError, ProtocolError):  # Redis may be restarting
                for announcement in await self._look():
                    if announcement.service in waiting:
                        waiting.remove(announcement.service)
                        yield announcement
            if not waiting and await http_status(self._stack.address, "/readyz") == 200:  # noqa: PLR2004
                return
            await asyncio.sleep(_POLL_S)

    async def _look(self) -> list[Announcement]:
        found = [
            Announcement(
                service=worker.worker_id,
                detail=f"{worker.device.partition('+')[0]}, {worker.dtype}, "
                f"{worker.threads} thread{'s' if worker.threads != 1 else ''}",
            )
            for worker in await self._read_workers()
        ]
        payload = await self._redis.get(keys.STATUS)
        status = codec.decode_value(cast("bytes", payload), dict) if payload else {}
        if int(status.get("epoch", 0)) > self._old_epoch:
            found.append(Announcement(service="scheduler", detail=str(status.get("policy", ""))))
        if await http_status(self._stack.address, "/healthz") == 200:  # noqa: PLR2004
            found.append(Announcement(service="gateway", detail=self._stack.url))
        return found

    async def _read_workers(self) -> list[WorkerInfo]:
        new = sorted(await _incarnations(self._redis) - self._old)
        payloads = await self._redis.mget([keys.worker(name) for name in new]) if new else []
        return readable_workers(payloads)


async def _incarnations(redis: Redis) -> frozenset[str]:
    names = await cast("Any", redis.smembers(keys.WORKERS))
    return frozenset(name.decode(errors="replace") for name in names)
