"""The gateways' notice board: one reader a process, whoever is waiting.

The board is trimmed and forgets, so it only makes things quick: a sweep asks the records every two
seconds about every request that is being watched, and nobody waits longer than that for news.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.logs import get_logger
from shared.messages import RequestFinished, RequestProgress, RequestsProgressed
from shared.store import keys
from shared.store.records import FINAL_STATES, Records
from shared.store.streams import MAX_BLOCK_MS, Streams

SWEEP_INTERVAL_S = 2.0
_SWEEP_BATCH = 256
_MAX_REMEMBERED = 16_384
_PAUSE_S = 0.5

log = get_logger()


class Watch:
    """What is known of some requests, from the moment the watch began.

    unfinished: those without a final state. progress: the latest of each. is_armed: they have been
    submitted, so a record that is missing means that it is lost, not that it is still to come.
    """

    def __init__(self, request_ids: Iterable[str]) -> None:
        self.unfinished = set(request_ids)
        self.progress: dict[str, RequestProgress] = {}
        self.is_armed = False
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Wait for news since the last call; several at once count as one."""
        await self._changed.wait()
        self._changed.clear()

    def advance(self, progress: RequestProgress) -> None:
        """Take note of progress."""
        self.progress[progress.request_id] = progress
        self._changed.set()

    def finish(self, request_id: str) -> None:
        """Take note that a request has its final state, or that its record is lost."""
        self.unfinished.discard(request_id)
        self._changed.set()


class EventBoard:
    """Reads the board and tells the watches.

    Args:
        redis: The connection; the caller owns it.
        records: On the same connection.
    """

    def __init__(self, redis: Redis, records: Records) -> None:
        self._redis = redis
        self._streams = Streams(redis)
        self._records = records
        self._watches: dict[str, Watch] = {}
        self._progress: OrderedDict[str, RequestProgress] = OrderedDict()

    @contextmanager
    def watch(self, request_ids: Iterable[str]) -> Iterator[Watch]:
        """Watch requests; begin before they are submitted, or their first news may be missed."""
        watch = Watch(request_ids)
        names = tuple(watch.unfinished)
        self._watches.update(dict.fromkeys(names, watch))
        try:
            yield watch
        finally:
            for name in names:
                del self._watches[name]

    def progress(self, request_id: str) -> RequestProgress | None:
        """Return the latest progress of any open request, whoever has submitted it."""
        return self._progress.get(request_id)

    async def read(self) -> None:
        """Read the board for ever; Redis may come and go.

        Cancelling it loses nothing: the board is read without a consumer group.
        """
        position = ""
        while True:
            try:
                position = position or await self._last_entry_id()
                entries = await self._streams.read(
                    {keys.EVENTS: position}, count=512, block_ms=MAX_BLOCK_MS
                )
            except (RedisError, OSError) as error:
                log.warning("can't read the events", error=str(error))
                await asyncio.sleep(_PAUSE_S)
                continue
            for entry in entries:
                position = entry.entry_id
                self._dispatch(entry.message)

    async def _last_entry_id(self) -> str:
        """Return where to begin, "$" made concrete: nothing is missed between two reads."""
        newest: Any = await self._redis.xrevrange(keys.EVENTS, count=1)
        return newest[0][0].decode() if newest else "0"

    def _dispatch(self, message: object) -> None:
        match message:
            case RequestsProgressed(items=items):
                for item in items:
                    self._remember(item)
                    if watch := self._watches.get(item.request_id):
                        watch.advance(item)
            case RequestFinished(request_id=request_id):
                self._finish(request_id)
            case _:
                log.warning("not an event for gateways", message=type(message).__name__)

    def _remember(self, progress: RequestProgress) -> None:
        self._progress[progress.request_id] = progress
        self._progress.move_to_end(progress.request_id)
        if len(self._progress) > _MAX_REMEMBERED:
            self._progress.popitem(last=False)

    def _finish(self, request_id: str) -> None:
        self._progress.pop(request_id, None)
        if watch := self._watches.get(request_id):
            watch.finish(request_id)

    async def sweep(self) -> None:
        """Ask the records about everything that is watched, for ever."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            watched = [
                name
                for name, watch in self._watches.items()
                if watch.is_armed and name in watch.unfinished
            ]
            try:
                for start in range(0, len(watched), _SWEEP_BATCH):
                    await self._ask(watched[start : start + _SWEEP_BATCH])
            except (RedisError, OSError) as error:
                log.warning("can't read the records", error=str(error))

    async def _ask(self, request_ids: list[str]) -> None:
        states = await self._records.states(request_ids)
        for request_id, state in zip(request_ids, states, strict=True):
            if state is None or state in FINAL_STATES:
                self._finish(request_id)
