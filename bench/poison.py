"""What should never lie in Redis: unreadable, out of range, or of another kind than its place.

Every service has to outlive all of it. The tests and `synerdiff bench liveness` pour it in.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack
from redis.asyncio import Redis

from shared import codec, keys
from shared.messages import DenoiseSlot, GenerateImage, RequestFinished, RowReport, SlotDenoised

Poison = Callable[[Redis], Awaitable[Any]]

ATTEMPT = "7-1"
"""Of a scheduler that is gone."""
SLOT = DenoiseSlot(epoch=1, seq=1, kind="alone", threads=0, rows=())


def holds(key: str, value: Any) -> Poison:
    """Return what gives a key a value that does not belong there."""

    async def put(redis: Any) -> None:
        await redis.delete(key)
        if isinstance(value, dict):
            await redis.hset(key, mapping=value)
        elif isinstance(value, list):
            await redis.rpush(key, *value)
        else:
            await redis.set(key, value)

    return put


def said(content: bytes) -> Poison:
    """Return what puts an entry into the scheduler's stream."""
    return lambda redis: redis.xadd(keys.SCHEDULER, {"m": content})


def registered(content: bytes) -> Poison:
    """Return what registers a worker with these words."""

    async def put(redis: Any) -> None:
        await redis.sadd(keys.WORKERS, "w-old")
        await redis.set(keys.worker("w-old"), content)

    return put


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisons:
    """All kinds of poison, by what they are."""

    request: GenerateImage
    """A good request for what is served, which most of them spoil; its id is its own."""
    worker: str
    """Whose work stream is spoiled: an incarnation."""
    failing: dict[str, Poison] = field(init=False)
    """They name their request, which fails with them."""
    nameless: dict[str, Poison] = field(init=False)
    """They name none that can be read, or none that there is."""
    harmless: dict[str, Poison] = field(init=False)
    """Their request is served all the same, from its first step."""

    def __post_init__(self) -> None:
        """Make all kinds."""
        object.__setattr__(self, "failing", self._make_failing())
        object.__setattr__(self, "nameless", self._make_nameless())
        object.__setattr__(self, "harmless", self._make_harmless())

    @property
    def every(self) -> dict[str, Poison]:
        """Return every kind."""
        return self.failing | self.nameless | self.harmless

    def _make_failing(self) -> dict[str, Poison]:
        prompt = msgpack.packb(self.request.parameters.prompt)
        nested = codec.encode(self.request).replace(prompt, b"\x91" * 900 + b"\xc0")
        return {
            "a priority that is infinite": self._queued(self._changed(priority=math.inf)),
            "a negative width": self._queued(self._changed(width=-8)),
            "no steps": self._queued(self._changed(num_inference_steps=0)),
            "a guidance scale that is no number": self._queued(
                self._changed(guidance_scale=math.nan)
            ),
            "a prompt that is no text": self._queued(self._changed(prompt=["a"])),
            "parameters nested deeply": self._queued(nested),
        }

    def _make_nameless(self) -> dict[str, Poison]:
        good = codec.encode(self.request)
        report = RowReport(
            request_id=self.request.request_id, attempt="1-1", has_run=True, next_step_index=1
        )
        denoised = SlotDenoised(
            incarnation=self.worker, epoch=1, seq=1, duration_ms=1.0, rows=(report,)
        )
        of_a_wrong_kind = RequestFinished(request_id=self.request.request_id, state="done")
        last_id = f"{2**64 - 1}-{2**64 - 1}"
        return {
            "a record that is garbage": self._record_is_garbage,
            "an entry that is no message": self._queued(b"\xff\x00", record=False),
            "an entry nested too deeply": self._queued(b"\x91" * 100_000 + b"\xc0", record=False),
            "an entry without a message": lambda redis: redis.xadd(keys.REQUESTS, {"x": "y"}),
            "a message of a wrong kind": self._queued(codec.encode(of_a_wrong_kind), record=False),
            "a request without a record": self._queued(good, record=False),
            "an entry of the last possible id": self._queued(good, entry_id=last_id, record=False),
            "a record that is a string": self._record_is_a_string,
            "requests that are a string": holds(keys.REQUESTS, "x"),
            "an unreadable report": said(b"\xc1"),
            "a report of a duration that is no number": said(
                codec.encode(replace(denoised, duration_ms=math.nan))
            ),
            "a report of a step before the first": said(
                codec.encode(replace(denoised, rows=(replace(report, next_step_index=-9),)))
            ),
            "a report of what was never sent": said(codec.encode(denoised)),
            "a command in the scheduler's stream": said(codec.encode(SLOT)),
            "a request in the scheduler's stream": said(good),
            "a scheduler's stream that is a string": holds(keys.SCHEDULER, "x"),
            "an epoch that is no number": holds(keys.EPOCH, "abc"),
            "an epoch of forty digits": holds(keys.EPOCH, "9" * 40),
            "an epoch that is a list": holds(keys.EPOCH, ["x"]),
            "a lease that never expires": holds(keys.SCHEDULER_LEASE, "someone"),
            "a lease that is a hash": holds(keys.SCHEDULER_LEASE, {"a": "b"}),
            "a status that is a list": holds(keys.STATUS, ["x"]),
            "a worker's name that is no text": lambda redis: redis.sadd(keys.WORKERS, b"\xff\xfe"),
            "workers that are a string": holds(keys.WORKERS, "x"),
            "a registration of another version": registered(msgpack.packb({"worker_id": "w"})),
            "a registration that is no message": registered(b"\xff"),
            "profiles that are garbage": holds(keys.PROFILES, {"x": b"\xff{"}),
            "profiles that are a string": holds(keys.PROFILES, "x"),
            "images that are a string": holds(keys.IMAGES, "x"),
            "sizes of images that are garbage": holds(keys.IMAGE_SIZES, {"total": "many"}),
            "events that are a string": holds(keys.EVENTS, "x"),
            "dead letters that are a string": holds(keys.DEAD_LETTERS, "x"),
            "final records that are a string": holds(keys.FINISHED, "x"),
            "a worker's stream that is a string": holds(keys.work(self.worker), "x"),
        }

    def _make_harmless(self) -> dict[str, Poison]:
        place = (self.request.request_id, ATTEMPT)
        return {
            "a resume step that is garbage": self._begun_beside(
                holds(keys.resume(*place), {"step": "zz"})
            ),
            "latents that are garbage": self._begun_beside(
                holds(keys.latents(*place), {"m": b"\xff"})
            ),
            "latents that are a string": self._begun_beside(holds(keys.latents(*place), "x")),
        }

    def _changed(self, **changes: Any) -> bytes:
        """Return the request with some fields changed, also to what none can hold."""
        fields = msgpack.unpackb(codec.encode(self.request))
        for name, value in changes.items():
            (fields["parameters"] if name in fields["parameters"] else fields)[name] = value
        return bytes(msgpack.packb(fields))

    def _queued(self, content: bytes, *, entry_id: str = "*", record: bool = True) -> Poison:
        """Return what puts an entry into the request stream, and a gateway's record of it."""

        async def put(redis: Any) -> None:
            if record:
                fields = {"state": "queued", "attempt": "", "submitted_at": "1"}
                await self._write_record(redis, {**fields, "request": content})
            await redis.xadd(keys.REQUESTS, {"m": content}, id=entry_id)

        return put

    def _begun_beside(self, other: Poison) -> Poison:
        """Return what queues the request as begun by an earlier scheduler, beside some poison."""

        async def put(redis: Any) -> None:
            await other(redis)
            good = codec.encode(self.request)
            fields = {"state": "running", "attempt": ATTEMPT, "submitted_at": "1"}
            await self._write_record(redis, {**fields, "request": good})
            await self._queued(good, record=False)(redis)

        return put

    async def _record_is_garbage(self, redis: Any) -> None:
        garbage = {"state": "queued", "submitted_at": "zz", "request": b"\xff", "attempts": "zz"}
        await self._write_record(redis, {**garbage, "entry": "zz"})
        await self._queued(codec.encode(self.request), record=False)(redis)

    async def _record_is_a_string(self, redis: Any) -> None:
        await self._queued(codec.encode(self.request))(redis)
        await holds(keys.request(self.request.request_id), "x")(redis)

    async def _write_record(self, redis: Any, fields: dict[str, Any]) -> None:
        await redis.hset(keys.request(self.request.request_id), mapping=fields)
