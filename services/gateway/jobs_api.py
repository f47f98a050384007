"""Our side: one picture by its id, how it is doing, and a way to cancel it."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from http import HTTPStatus

from aiohttp import web

from services.gateway import replies
from services.gateway.context import GATEWAY, Gateway
from services.gateway.http_errors import failure, not_found, unavailable
from shared.records import RequestRecord

_POLL_AFTER_S = 1
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


async def show_image(request: web.Request) -> web.Response:
    """The picture itself; 202 with its status while there is none yet, 410 once it has expired."""
    gateway = request.app[GATEWAY]
    record = await _read(request, gateway)
    if record.state != "done":
        if record.is_final:
            raise failure(record)
        return _reply(
            request, gateway, record, status=HTTPStatus.ACCEPTED, retry_after_s=_POLL_AFTER_S
        )
    image = await gateway.generation.read_image(record)
    content_type = record.outcome.content_type if record.outcome else "application/octet-stream"
    name = f"{record.request_id}.{_EXTENSIONS.get(content_type, 'bin')}"
    return web.Response(
        body=image,
        content_type=content_type,
        headers={
            "Cache-Control": f"private, max-age={gateway.settings.image_ttl_s}, immutable",
            "Content-Disposition": f'inline; filename="{name}"',
        },
    )


async def show_request(request: web.Request) -> web.Response:
    """How a request is doing."""
    gateway = request.app[GATEWAY]
    return _reply(request, gateway, await _read(request, gateway))


async def cancel_request(request: web.Request) -> web.Response:
    """Cancel a request; one that is final stays as it is. Either way, how it is now."""
    gateway = request.app[GATEWAY]
    record = await _read(request, gateway)
    await gateway.records.cancel(record.request_id, reason="Cancelled by a client.")
    return _reply(request, gateway, await _read(request, gateway))


async def _read(request: web.Request, gateway: Gateway) -> RequestRecord:
    request_id = request.match_info["request_id"]
    if gateway.fleet.is_silent(time.monotonic()):
        raise unavailable("Redis does not answer.", code="store_unavailable")
    record = await gateway.records.read(request_id) if _ID.fullmatch(request_id) else None
    if record is None:
        raise not_found(f"There is no request {request_id[:64]!r}, or it was long ago.")
    return record


def _reply(
    request: web.Request,
    gateway: Gateway,
    record: RequestRecord,
    *,
    status: int = HTTPStatus.OK,
    retry_after_s: int | None = None,
) -> web.Response:
    headers = {"Cache-Control": "no-store"}
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    return web.json_response(
        text=_describe(request, gateway, record).model_dump_json(), status=status, headers=headers
    )


def _describe(
    request: web.Request, gateway: Gateway, record: RequestRecord
) -> replies.RequestReply:
    progress = None if record.is_final else gateway.board.progress(record.request_id)
    outcome = record.outcome
    position = gateway.fleet.queue_position(record.request_id) if record.state == "queued" else None
    return replies.RequestReply(
        id=record.request_id,
        job_id=record.request.job_id,
        state=record.state,
        queue_position=position,
        step=progress.step if progress else None,
        num_steps=progress.num_steps if progress else None,
        num_attempts=record.num_attempts,
        submitted_at=record.submitted_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        waited_s=_seconds(record.submitted_at, record.started_at),
        total_s=_seconds(record.submitted_at, record.finished_at),
        parameters=asdict(record.request.parameters),
        url=gateway.image_url(request, record.request_id) if record.state == "done" else None,
        outcome=replies.OutcomeReply(
            content_type=outcome.content_type,
            size_bytes=outcome.size_bytes,
            skipped_steps=list(outcome.skipped_steps),
            warnings=list(outcome.warnings),
            decode_s=outcome.decode_s,
            transport=outcome.transport,
        )
        if outcome
        else None,
        error=failure(record).detail if record.state in {"failed", "cancelled"} else None,
    )


def _seconds(start: float, end: float | None) -> float | None:
    return None if end is None else round(end - start, 4)
