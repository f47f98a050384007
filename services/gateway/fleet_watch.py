"""Keeps a look at workers, scheduler and store up to date."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, RedisError

from services.gateway.fleet import Fleet, StoreState, look, read_status
from shared import codec, keys
from shared.errors import ProtocolError
from shared.logs import get_logger
from shared.messages import WorkerInfo

LOOK_INTERVAL_S = 0.5
_PROBE_TTL_MS = 60_000

log = get_logger()


class FleetWatch:
    """Keeps `fleet` up to date while `run` runs.

    redis: the connection; the caller owns it.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.fleet = Fleet()

    async def run(self) -> None:
        """Look twice a second, for ever; Redis may come and go."""
        while True:
            try:
                await self.refresh()
            except (RedisError, OSError) as error:
                log.warning("can't read the registrations", error=str(error))
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def refresh(self) -> None:
        """Look once.

        Raises:
            RedisError: Redis does not answer.
        """
        incarnations = await cast("Any", self._redis.smembers(keys.WORKERS))
        async with self._redis.pipeline(transaction=False) as pipeline:
            for incarnation in sorted(incarnations):
                pipeline.get(keys.worker(incarnation.decode(errors="replace")))
            pipeline.get(keys.STATUS)
            pipeline.pttl(keys.STATUS)
            pipeline.info("memory")
            pipeline.set(keys.WRITE_PROBE, 1, px=_PROBE_TTL_MS)
            answers = await pipeline.execute(raise_on_error=False)
        *payloads, status, ttl_ms, memory, written = answers
        for answer in (status, ttl_ms, memory):
            if isinstance(answer, RedisError):
                raise answer
        now = time.monotonic()
        age_s = min(max(keys.STATUS_TTL_S - ttl_ms / 1000, 0.0), keys.STATUS_TTL_S)
        self.fleet = look(
            self.fleet,
            workers=[worker for payload in payloads if (worker := _read_worker(payload))],
            status=read_status(status, now - age_s),
            store=_read_store(memory, written),
            now=now,
            wall_now=time.time(),
        )


def _read_store(memory: Mapping[str, Any], written: object) -> StoreState:
    """How Redis is, from its INFO and from what it said to a small write."""
    maxmemory = memory.get("maxmemory", 0)
    # As the server counts before it refuses: without what waits for its disk.
    used = memory.get("used_memory", 0) - memory.get("mem_not_counted_for_evict", 0)
    return StoreState(
        memory_fraction=used / maxmemory if maxmemory else 0.0,
        write_error=str(written) if isinstance(written, RedisError) else "",
        is_out_of_memory=isinstance(written, OutOfMemoryError),
    )


def _read_worker(payload: bytes | RedisError | None) -> WorkerInfo | None:
    """A registration; None if it has lapsed, or is of a version that this one can't read."""
    if not isinstance(payload, bytes):
        return None
    try:
        return codec.decode_value(payload, WorkerInfo)
    except ProtocolError as error:
        log.warning("unreadable registration", error=str(error))
        return None
