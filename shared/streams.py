"""Typed message streams over Redis, and the connection they share.

Every stream here has one reader, so plain reads from a remembered position serve and no consumer
group stands between: an entry stays until its reader deletes it, and a restarted reader begins
again at the beginning. Stop flags, not cancellation, end a blocking read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared import codec, keys
from shared.errors import ProtocolError
from shared.messages import Message

SOCKET_TIMEOUT_S = 10.0
"""Above any BLOCK we use, or an idle blocking read would look like a dead server."""

POOL_TIMEOUT_S = 30.0
"""How long a command waits for a free connection."""

MAX_BLOCK_MS = 1_000
"""Longest blocking read; a stop flag is noticed within it."""


def connect(url: str, *, max_connections: int = 32) -> Redis:
    """A client that rides out a server restart: every command is retried for about half a minute.

    Retrying is safe because every message is idempotent for its receiver. With all connections in
    use a command waits for one.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        protocol=2,
        max_connections=max_connections,
        timeout=POOL_TIMEOUT_S,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=5.0,
        health_check_interval=15,
        retry=Retry(ExponentialBackoff(cap=1.0, base=0.05), retries=35),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
    )
    return Redis.from_pool(pool)


@cache
def _source(name: str) -> str:
    return resources.files("shared").joinpath("lua", f"{name}.lua").read_text()


def script(redis: Redis, name: str) -> AsyncScript:
    """The Lua script `shared/lua/NAME.lua`, bound to a client."""
    return redis.register_script(_source(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A message and its place in its stream."""

    stream: str
    entry_id: str
    message: Message


class Streams:
    """Sends and reads typed messages.

    Args:
        redis: The connection; the caller owns it.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def send(self, stream: str, *messages: Message) -> None:
        """Append messages in order; the stream is created if need be."""
        await self._append([(stream, message) for message in messages], makes_streams=True)

    async def send_to_workers(self, items: Sequence[tuple[str, Message]]) -> None:
        """Append (stream, message) pairs in order; a stream that is gone swallows its message."""
        await self._append(items, makes_streams=False)

    async def notify(self, message: Message) -> None:
        """Put a message on the gateways' notice board."""
        await self._redis.xadd(
            keys.EVENTS, {"m": codec.encode(message)}, maxlen=4096, approximate=True
        )

    async def read(
        self, positions: Mapping[str, str], *, count: int, block_ms: int | None = None
    ) -> list[Entry]:
        """Entries after the given position of each stream, oldest first within a stream.

        An entry that can't be decoded is moved to the dead letters and left out.

        Args:
            positions: The last entry id seen, by stream; "0" for the beginning.
            count: At most so many entries a stream.
            block_ms: Wait this long for the first (at most `MAX_BLOCK_MS`); None does not wait.
        """
        answer: Any = await self._redis.xread(
            cast("Any", dict(positions)), count=count, block=block_ms
        )
        entries: list[Entry] = []
        for raw_name, batch in answer or []:
            name = raw_name.decode()
            for raw_id, fields in batch:
                entry_id = raw_id.decode()
                try:
                    message = codec.decode(fields.get(b"m", b""))
                except ProtocolError as error:
                    await self._bury(name, entry_id, fields, str(error))
                    continue
                entries.append(Entry(stream=name, entry_id=entry_id, message=message))
        return entries

    async def delete(self, stream: str, entry_ids: Iterable[str]) -> None:
        """Drop handled entries."""
        ids = list(entry_ids)
        if ids:
            await self._redis.xdel(stream, *ids)

    async def _append(self, items: Sequence[tuple[str, Message]], *, makes_streams: bool) -> None:
        """All of them or none. One, as most of the time, is a command and no transaction."""
        if not items:
            return
        async with self._redis.pipeline(transaction=len(items) > 1) as pipeline:
            for stream, message in items:
                pipeline.xadd(stream, {"m": codec.encode(message)}, nomkstream=not makes_streams)
            await pipeline.execute()

    async def _bury(
        self, stream: str, entry_id: str, fields: Mapping[bytes, bytes], reason: str
    ) -> None:
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.xadd(
                keys.DEAD_LETTERS,
                {"stream": stream, "reason": reason, "m": fields.get(b"m", b"")},
                maxlen=1000,
            )
            pipeline.xdel(stream, entry_id)
            await pipeline.execute()
