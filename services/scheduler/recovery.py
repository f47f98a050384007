"""What Redis still has of a request from before this epoch, whatever it holds."""

from __future__ import annotations

from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from services.scheduler.events import RequestRecovered
from shared import codec, keys
from shared.errors import ProtocolError
from shared.logs import get_logger
from shared.messages import GenerateImage, LatentsFinished
from shared.records import Records

log = get_logger()


async def find_request(
    redis: Redis, records: Records, request: GenerateImage
) -> RequestRecovered | None:
    """How far an open request is; None if it is final, or has no record any more.

    Raises:
        ProtocolError: Its record can't be read.
    """
    record = await records.read(request.request_id)
    if record is None or record.is_final:
        return None
    latents, resume_step = None, 0
    if record.attempt:
        latents = await _find_latents(redis, request.request_id, record.attempt)
        resume_step = await _find_resume_step(redis, request.request_id, record.attempt)
    return RequestRecovered(
        request=request,
        attempt=record.attempt,
        num_attempts=record.num_attempts,
        latents=latents,
        resume_step=resume_step,
    )


async def _find_latents(redis: Redis, request_id: str, attempt: str) -> LatentsFinished | None:
    """What was left of finished latents, None where there is nothing that can be read."""
    try:
        payload = await cast("Any", redis.hget(keys.latents(request_id, attempt), "m"))
        message = codec.decode(payload) if payload else None
    except (ProtocolError, ResponseError) as error:
        log.warning("latents can't be read", request_id=request_id, error=str(error))
        return None
    return message if isinstance(message, LatentsFinished) else None


async def _find_resume_step(redis: Redis, request_id: str, attempt: str) -> int:
    """The step that a drained worker has left, 0 where there is none that can be read."""
    try:
        step = await cast("Any", redis.hget(keys.resume(request_id, attempt), "step"))
        return max(0, int(step or 0))
    except (ValueError, ResponseError) as error:
        log.warning("a resume step can't be read", request_id=request_id, error=str(error))
        return 0
