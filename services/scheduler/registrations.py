"""The workers' registrations as they lie in Redis, whatever they hold."""

from __future__ import annotations

from typing import Any, cast

from redis.asyncio import Redis

from shared import codec, keys
from shared.errors import ProtocolError
from shared.logs import get_logger
from shared.messages import WorkerInfo
from shared.streams import Writer, script

log = get_logger()


class Registrations:
    """Reads registrations, and deletes those of lost workers.

    Args:
        redis: The connection; the caller owns it.
        writer: Names the epoch.
    """

    def __init__(self, redis: Redis, writer: Writer) -> None:
        self._redis = redis
        self._writer = writer
        self._forget = script(redis, "forget_worker")
        self._warned: set[tuple[str, bytes]] = set()
        self._lapsed: set[str] = set()

    async def read(self) -> list[WorkerInfo]:
        """Everybody who is registered; those of another version are left out with a warning.

        Names without a registration, of workers that died while no scheduler ran, are forgotten
        once two looks have missed it.
        """
        names = await self._names()
        payloads = await self._redis.mget([keys.worker(name) for name in names]) if names else []
        found = dict(zip(names, cast("list[bytes | None]", payloads), strict=True))
        workers = [self._parse(name, payload) for name, payload in found.items() if payload]
        lapsed = {name for name, payload in found.items() if not payload}
        for name in lapsed & self._lapsed:
            await self.forget(name, only_lapsed=True)
        self._lapsed = lapsed
        return [worker for worker in workers if worker]

    async def forget(self, incarnation: str, *, only_lapsed: bool = False) -> None:
        """Delete a worker's registration and streams; only_lapsed: unless it is registered."""
        await self._writer.call(
            self._forget,
            keys=[keys.worker(incarnation), keys.work(incarnation), keys.control(incarnation)],
            args=[self._writer.epoch, incarnation, "lapsed" if only_lapsed else ""],
        )

    async def _names(self) -> list[str]:
        names = []
        for member in await cast("Any", self._redis.smembers(keys.WORKERS)):
            try:
                names.append(member.decode())
            except UnicodeDecodeError:
                log.warning("a worker's name can't be read", name=repr(member))
                await self._writer.write(("SREM", keys.WORKERS, member))
        return sorted(names)

    def _parse(self, name: str, payload: bytes) -> WorkerInfo | None:
        try:
            worker = codec.decode_value(payload, WorkerInfo)
        except ProtocolError as error:
            if (name, payload) not in self._warned:
                self._warned.add((name, payload))
                log.warning("a registration is ignored", incarnation=name, error=str(error))
            return None
        return worker if worker.incarnation == name else None
