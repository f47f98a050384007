"""Counts what is parked, whoever has parked it, and shows how much is kept."""

from __future__ import annotations

from typing import Any, cast

from redis.asyncio import Redis

from shared import keys, metrics
from shared.logs import get_logger

_OF_A_WORKER = keys.worker("")
_BATCH = 256

log = get_logger()


class DeadLetters:
    """Follows the stream of dead letters.

    Args:
        redis: The connection; the caller owns it.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._position = "0-0"

    async def begin(self) -> None:
        """What is there already has been counted."""
        newest: Any = await self._redis.xrevrange(keys.DEAD_LETTERS, count=1)
        self._position = newest[0][0].decode() if newest else "0-0"

    async def follow(self) -> None:
        """Count and log what is new, and show what is kept."""
        new: Any = await self._redis.xrange(
            keys.DEAD_LETTERS, min=f"({self._position}", count=_BATCH
        )
        for entry_id, fields in new:
            self._position = entry_id.decode()
            stream = fields.get(b"stream", b"").decode(errors="replace")
            reason = fields.get(b"reason", b"").decode(errors="replace")
            metrics.DEAD_LETTERS.labels(stream=_name(stream)).inc()
            log.error("parked as a dead letter", stream=stream, reason=reason)
        metrics.DEAD_LETTERS_KEPT.set(await self._redis.xlen(keys.DEAD_LETTERS))
        size = await cast("Any", self._redis.memory_usage(keys.DEAD_LETTERS))
        metrics.DEAD_LETTERS_BYTES.set(size or 0)


def _name(stream: str) -> str:
    """The stream's, the lane's for workers' and the kind's for other keys: labels are few."""
    if stream.startswith(_OF_A_WORKER):
        return f"worker:{stream.rpartition(':')[2]}"
    head = ":".join(stream.split(":")[:2])
    return head if head in _KNOWN else "other"


_KNOWN = frozenset(
    {
        keys.REQUESTS,
        keys.SCHEDULER,
        keys.EVENTS,
        keys.EPOCH,
        keys.WORKERS,
        keys.PROFILES,
        keys.IMAGES,
        keys.FINISHED,
        "sd:request",
    }
)
