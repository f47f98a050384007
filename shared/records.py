"""Jobs, requests and images as Redis keeps them; each change of a request's state is one Lua call.

States of a record: queued, running (an attempt is named), and the final ones done, failed and
cancelled. The scheduler knows finer ones; they live in its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared import codec, keys
from shared.errors import OverloadedError, ProtocolError
from shared.messages import (
    CommitRefused,
    GenerateImage,
    ImageDecoded,
    ReleaseLatents,
    RequestCancelled,
    RequestFinished,
)
from shared.streams import Writer, script

FINAL_STATES = frozenset({"done", "failed", "cancelled"})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One HTTP request: its images in order."""

    job_id: str
    request_ids: tuple[str, ...]
    owner: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a finished image came with. Durations in seconds, as the workers saw them."""

    content_type: str
    size_bytes: int
    seed: int
    skipped_steps: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    decode_s: float = 0.0
    transport: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One image's record. code, reason: of a failure. image_key: empty until done."""

    request_id: str
    state: str
    attempt: str
    num_attempts: int
    submitted_at: float
    started_at: float | None
    finished_at: float | None
    request: GenerateImage
    code: str = ""
    reason: str = ""
    image_key: str = ""
    outcome: Outcome | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing can change it any more."""
        return self.state in FINAL_STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long results stay. image_budget_bytes: the oldest images go when the sum exceeds it.

    They go sooner where the server's memory is short, and so do the oldest records.
    """

    image_ttl_s: int = 3_600
    record_ttl_s: int = 86_400
    image_budget_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """All that a VAE worker says when it commits an image."""

    decoded: ImageDecoded
    image: bytes
    outcome: Outcome
    release: ReleaseLatents | None = None
    release_to: str = ""


@dataclass(slots=True)
class Records:
    """Reads and changes records; all instants in them are the store's.

    redis: the connection; the caller owns it. epoch: a scheduler's; its writes are refused once a
    newer one has begun.
    """

    redis: Redis
    retention: Retention = field(default_factory=Retention)
    epoch: int | None = None

    def __post_init__(self) -> None:
        """Bind the scripts to the connection."""
        self._scripts = {
            name: script(self.redis, name)
            for name in ("submit", "begin_attempt", "finish", "commit", "make_room")
        }
        self._writer = Writer(self.redis, self.epoch)

    _scripts: dict[str, Any] = field(init=False, repr=False)
    _writer: Writer = field(init=False, repr=False)

    async def submit(
        self, job: JobRecord, requests: Sequence[GenerateImage], *, max_open: int
    ) -> bool:
        """Accept a job with all its images, or none of it.

        Returns:
            False if this job_id was accepted before (nothing changes then).

        Raises:
            OverloadedError: Too many open requests.
        """
        arguments: list[Any] = [
            max_open,
            self.retention.record_ttl_s,
            codec.encode_value(job),
        ]
        for request in requests:
            arguments += [request.request_id, codec.encode(request)]
        status, num_open = await self._scripts["submit"](
            keys=[
                keys.job(job.job_id),
                *(keys.request(request.request_id) for request in requests),
            ],
            args=arguments,
        )
        if status < 0:
            raise OverloadedError(
                f"{num_open} requests are open and at most {max_open} may be.", retry_after_s=2.0
            )
        return bool(status)

    async def begin_attempt(self, request_id: str, attempt: str) -> bool:
        """Name the attempt that may commit.

        Returns:
            False if the request is final already, unknown, or named by a newer epoch.

        Raises:
            EpochEndedError: A newer epoch than this one's has begun.
        """
        answer = await self._writer.call(
            self._scripts["begin_attempt"],
            keys=[keys.request(request_id)],
            args=[self._writer.epoch, attempt],
        )
        return bool(answer)

    async def make_room(self) -> None:
        """Let the oldest results go where the server's memory is short, before it refuses any.

        Raises:
            EpochEndedError: A newer epoch than this one's has begun.
        """
        budget = self.retention.image_budget_bytes
        await self._writer.call(self._scripts["make_room"], args=[self._writer.epoch, budget])

    async def fail(self, request_id: str, *, code: str, reason: str) -> bool:
        """Make a request final as failed; False if it is final already."""
        return await self._finish(request_id, "failed", code, reason, b"")

    async def cancel(self, request_id: str, *, reason: str) -> bool:
        """Make a request final as cancelled, tell the scheduler; False if it is final already."""
        note = codec.encode(RequestCancelled(request_id=request_id))
        return await self._finish(request_id, "cancelled", "cancelled", reason, note)

    async def _finish(
        self, request_id: str, state: str, code: str, reason: str, note: bytes
    ) -> bool:
        event = codec.encode(RequestFinished(request_id=request_id, state=state))
        answer = await self._writer.call(
            self._scripts["finish"],
            keys=[keys.request(request_id)],
            args=[
                self._writer.epoch,
                state,
                code,
                reason,
                self.retention.record_ttl_s,
                event,
                note,
            ],
        )
        return bool(answer)

    async def commit(self, commit: Commit) -> bool:
        """Store an image and make its request done; False if a newer attempt or a final state won.

        Either way the producer is told that its pool slot is free, and the scheduler what happened.
        """
        decoded = commit.decoded
        image_key = keys.image(decoded.request_id, decoded.attempt)
        event = codec.encode(RequestFinished(request_id=decoded.request_id, state="done"))
        refused = CommitRefused(
            incarnation=decoded.incarnation,
            request_id=decoded.request_id,
            attempt=decoded.attempt,
        )
        answer = await self._scripts["commit"](
            keys=[
                keys.request(decoded.request_id),
                commit.release_to,
                image_key,
                keys.latents(decoded.request_id, decoded.attempt),
            ],
            args=[
                decoded.attempt,
                commit.image,
                codec.encode_value(commit.outcome),
                self.retention.image_ttl_s,
                self.retention.record_ttl_s,
                self.retention.image_budget_bytes,
                event,
                codec.encode(decoded),
                codec.encode(refused),
                codec.encode(commit.release) if commit.release and commit.release_to else b"",
            ],
        )
        return bool(answer)

    async def read(self, request_id: str) -> RequestRecord | None:
        """A request's record, None if there is none (never was, or has expired).

        Raises:
            ProtocolError: There is one that can't be read.
        """
        try:
            fields = await cast("Any", self.redis.hgetall(keys.request(request_id)))
            return _parse_record(request_id, fields) if b"request" in fields else None
        except (ValueError, KeyError, ResponseError) as error:
            if isinstance(error, ResponseError) and "WRONGTYPE" not in str(error):
                raise
            raise ProtocolError(f"the record of {request_id} can't be read: {error!r}") from error

    async def states(self, request_ids: Sequence[str]) -> list[str | None]:
        """States of many requests in one round trip, None where there is no record."""
        async with self.redis.pipeline(transaction=False) as pipeline:
            for request_id in request_ids:
                pipeline.hget(keys.request(request_id), "state")
            found = await pipeline.execute(raise_on_error=False)
        # A record that is none is as good as lost.
        states = [state if isinstance(state, bytes) else None for state in found]
        return [state.decode(errors="replace") if state else None for state in states]

    async def read_job(self, job_id: str) -> JobRecord | None:
        """A job's record, None if there is none."""
        payload = await cast("Any", self.redis.hget(keys.job(job_id), "job"))
        return codec.decode_value(payload, JobRecord) if payload else None

    async def read_image(self, record: RequestRecord) -> bytes | None:
        """The stored image of a finished request, None once it has expired or was evicted."""
        image = await self.redis.get(record.image_key) if record.image_key else None
        return cast("bytes | None", image)

    async def open_requests(self) -> int:
        """How many requests have no final state yet."""
        return int(await self.redis.xlen(keys.REQUESTS))


def _parse_record(request_id: str, fields: dict[bytes, bytes]) -> RequestRecord:
    request = codec.decode(fields[b"request"])
    if not isinstance(request, GenerateImage):
        raise ProtocolError(f"the record of {request_id} holds a {type(request).__name__}")

    def instant(name: bytes) -> float | None:
        return float(fields[name]) if name in fields else None

    outcome = fields.get(b"outcome")
    return RequestRecord(
        request_id=request_id,
        state=fields[b"state"].decode(),
        attempt=fields[b"attempt"].decode(),
        num_attempts=int(fields.get(b"attempts", b"0")),
        submitted_at=float(fields[b"submitted_at"]),
        started_at=instant(b"started_at"),
        finished_at=instant(b"finished_at"),
        request=request,
        code=fields.get(b"code", b"").decode(),
        reason=fields.get(b"reason", b"").decode(),
        image_key=fields.get(b"image", b"").decode(),
        outcome=codec.decode_value(outcome, Outcome) if outcome else None,
    )
