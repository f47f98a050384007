"""Typed message streams over Redis, and the connection they share.

Every stream here has one reader, so plain reads from a remembered position serve and no consumer
group stands between: an entry stays until its reader deletes it, and a restarted reader begins
again at the beginning. Stop flags, not cancellation, end a blocking read.

Whatever an entry or a key holds, its reader goes on: what can't be read is parked in the dead
letters. Every write of a scheduler names its epoch, and the store refuses an older one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, cast

import msgpack
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared import codec, keys
from shared.errors import EpochEndedError, ProtocolError
from shared.messages import Message, RequestFinished
from shared.patience import PatientRedis, StorePatience

SOCKET_TIMEOUT_S = 10.0
"""Above any BLOCK we use, or an idle blocking read would look like a dead server."""

POOL_TIMEOUT_S = 30.0
"""How long a command waits for a free connection."""

MAX_AHEAD_S = 366 * 86_400
"""An entry id further ahead of this process's clock was not given by the store: entries after it
would have smaller ones, and be missed."""

MAX_BLOCK_MS = 1_000
"""Longest blocking read; a stop flag is noticed within it."""


def connect(url: str, *, max_connections: int = 32, is_patient: bool = True) -> PatientRedis:
    """A client that rides out a server restart: every command is retried for about half a minute.

    Retrying is safe because every message is idempotent for its receiver. With all connections in
    use a command waits for one. While the store is full or otherwise paused, a patient client
    waits, another one raises.
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
    client = PatientRedis(connection_pool=pool)
    client.auto_close_connection_pool = True
    client.patience = StorePatience(is_patient=is_patient)
    return client


@cache
def _source(name: str) -> str:
    """A script, the part that all share and the names of the keys behind its first line."""
    folder = resources.files("shared").joinpath("lua")
    flags, _, body = folder.joinpath(f"{name}.lua").read_text().partition("\n")
    names = "\n".join(f"local {key} = '{getattr(keys, key)}'" for key in _KEYS_IN_SCRIPTS)
    return f"{flags}\n{names}\n{folder.joinpath('common.lua').read_text()}\n{body}"


_KEYS_IN_SCRIPTS = (
    "REQUESTS",
    "SCHEDULER",
    "EVENTS",
    "DEAD_LETTERS",
    "EPOCH",
    "WORKERS",
    "FINISHED",
    "IMAGES",
    "IMAGE_SIZES",
)


def script(redis: Redis, name: str) -> AsyncScript:
    """The Lua script `shared/lua/NAME.lua`, bound to a client."""
    return redis.register_script(_source(name))


Command = Sequence[str | bytes | int]
"""A Redis command that writes: its name, its key, its arguments."""


class Writer:
    """Carries out writes in one call, refused once a newer epoch than the writer's has begun.

    Args:
        redis: The connection; the caller owns it.
        epoch: The writer's, None for one that has none.
    """

    def __init__(self, redis: Redis, epoch: int | None = None) -> None:
        self._redis = redis
        self._write = script(redis, "write")
        self.epoch = "" if epoch is None else str(epoch)

    async def write(self, *commands: Command) -> Any:
        """The answer to the last command.

        Raises:
            EpochEndedError: Nothing was written.
        """
        packed = [[p if isinstance(p, bytes) else str(p) for p in c] for c in commands]
        payload = msgpack.packb(packed, use_bin_type=False)
        return await self.call(self._write, args=[self.epoch, payload])

    async def call(self, lua: AsyncScript, *, args: Sequence[Any], keys: Sequence[str] = ()) -> Any:
        """The answer of a script that names the writer's epoch among its arguments.

        Raises:
            EpochEndedError: Nothing was written.
        """
        try:
            return await lua(keys=list(keys), args=list(args), client=self._redis)
        except ResponseError as error:
            if "EPOCHENDED" in str(error):
                raise EpochEndedError("another scheduler has begun a newer epoch") from error
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A message and its place in its stream."""

    stream: str
    entry_id: str
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Buried:
    """An entry that was parked. has_failed: its request was open and has failed with it."""

    stream: str
    entry_id: str
    payload: bytes
    request_id: str = ""
    has_failed: bool = False


@dataclass(slots=True)
class Reading:
    """What one read has found, in order within a stream."""

    entries: list[Entry] = field(default_factory=list)
    buried: list[Buried] = field(default_factory=list)


def _decode(entry_id: str, payload: bytes, accepted: tuple[type, ...] | None) -> Message:
    if int(entry_id.partition("-")[0]) > (time.time() + MAX_AHEAD_S) * 1000:
        raise ProtocolError("its id lies in the future")
    message = codec.decode(payload)
    if accepted and not isinstance(message, accepted):
        raise ProtocolError(f"{type(message).__name__} does not belong here")
    return message


class Streams:
    """Sends and reads typed messages.

    Args:
        redis: The connection; the caller owns it.
        epoch: A scheduler's; its writes are refused once a newer one has begun.
        record_ttl_s: How long the record of a request is kept that fails with its entry.
    """

    def __init__(
        self, redis: Redis, *, epoch: int | None = None, record_ttl_s: int = 86_400
    ) -> None:
        self._redis = redis
        self._writer = Writer(redis, epoch)
        self._bury = script(redis, "bury")
        self._discard = script(redis, "discard")
        self._record_ttl_s = record_ttl_s

    async def send(self, stream: str, *messages: Message) -> None:
        """Append messages in order; the stream is created if need be."""
        if messages:
            await self._writer.write(
                *(("XADD", stream, "*", "m", codec.encode(message)) for message in messages)
            )

    async def send_to_workers(self, items: Sequence[tuple[str, Message]]) -> None:
        """Append (stream, message) pairs in order; a stream that is gone swallows its message."""
        if items:
            await self._writer.write(
                *(
                    ("XADD", stream, "NOMKSTREAM", "*", "m", codec.encode(message))
                    for stream, message in items
                )
            )

    async def notify(self, message: Message) -> None:
        """Put a message on the gateways' notice board."""
        payload = codec.encode(message)
        await self._writer.write(("XADD", keys.EVENTS, "MAXLEN", "~", 4096, "*", "m", payload))

    async def read(
        self,
        positions: Mapping[str, str],
        *,
        count: int,
        block_ms: int | None = None,
        kinds: Mapping[str, tuple[type, ...]] | None = None,
    ) -> list[Entry]:
        """As `read_all`, without what was parked."""
        reading = await self.read_all(positions, count=count, block_ms=block_ms, kinds=kinds)
        return reading.entries

    async def read_all(
        self,
        positions: Mapping[str, str],
        *,
        count: int,
        block_ms: int | None = None,
        kinds: Mapping[str, tuple[type, ...]] | None = None,
    ) -> Reading:
        """Entries after the given position of each stream, oldest first within a stream.

        An entry that can't be decoded, or that is no message for its stream, is moved to the dead
        letters; so is a key that is no stream.

        Args:
            positions: The last entry id seen, by stream; "0" for the beginning.
            count: At most so many entries a stream.
            block_ms: Wait this long for the first (at most `MAX_BLOCK_MS`); None does not wait.
            kinds: What belongs into a stream, where only some messages do.
        """
        try:
            answer: Any = await self._redis.xread(
                cast("Any", dict(positions)), count=count, block=block_ms
            )
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            await self._discard(keys=list(positions))
            return Reading()
        reading = Reading()
        for raw_name, batch in answer or []:
            stream = raw_name.decode()
            accepted = (kinds or {}).get(stream)
            for raw_id, fields in batch:
                entry_id = raw_id.decode()
                try:
                    message = _decode(entry_id, fields.get(b"m", b""), accepted)
                except ProtocolError as error:
                    buried = await self.bury(stream, entry_id, fields, str(error))
                    reading.buried.append(buried)
                    continue
                reading.entries.append(Entry(stream=stream, entry_id=entry_id, message=message))
        return reading

    async def delete(self, stream: str, entry_ids: Iterable[str]) -> None:
        """Drop handled entries."""
        ids = list(entry_ids)
        if ids:
            await self._writer.write(("XDEL", stream, *ids))

    async def bury(
        self, stream: str, entry_id: str, fields: Mapping[bytes, bytes], reason: str
    ) -> Buried:
        """Park an entry that nobody can handle; a request of `keys.REQUESTS` fails with it."""
        payload = fields.get(b"m", b"")
        request_id = ""
        if stream == keys.REQUESTS:
            named = fields.get(b"r", b"").decode(errors="replace")
            request_id = named or codec.peek(payload, "request_id", str) or ""
        event = RequestFinished(request_id=request_id, state="failed")
        has_failed = await self._writer.call(
            self._bury,
            keys=[stream, keys.request(request_id) if request_id else ""],
            args=[
                self._writer.epoch,
                entry_id,
                f"the entry can't be handled: {reason}",
                payload,
                ProtocolError.code,
                self._record_ttl_s,
                codec.encode(event),
            ],
        )
        return Buried(
            stream=stream,
            entry_id=entry_id,
            payload=payload,
            request_id=request_id,
            has_failed=bool(has_failed),
        )
