"""OpenAI's side: `POST /v1/images/generations` and the models."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
import time
from http import HTTPStatus

from aiohttp import web

from services.gateway import replies
from services.gateway.context import GATEWAY, REQUEST_ID, Gateway
from services.gateway.generation import Submission
from services.gateway.http_errors import ApiError, from_exception, unavailable
from services.gateway.models_api import check_is_served, check_store, choose_model
from services.gateway.order import (
    ImageOrder,
    count_latent_positions,
    count_prompt_tokens,
    limits_of,
    order_images,
)
from services.gateway.request_body import read_body
from services.gateway.validation import GenerationBody, parse_body
from shared.logs import get_logger
from shared.records import Outcome, RequestRecord

HEARTBEAT_S = 2.0
"""Longest silence of a stream: clients and proxies see that it is alive."""
_DEADLINE_SLACK_S = 1.0
_RANDOM_SEED_BITS = 32
"""Random seeds fit into every client's integers, JavaScript's as well."""

log = get_logger()


async def generate(request: web.Request) -> web.StreamResponse:
    """Make pictures and answer when they are done, or stream what becomes of one."""
    gateway = request.app[GATEWAY]
    if gateway.is_draining:
        raise unavailable("This gateway is shutting down; try again.", code="shutting_down")
    if request.content_type != "application/json":
        raise ApiError(
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            message=f"The 'Content-Type' is {request.content_type}. Allowed: application/json.",
            code="unsupported_media_type",
        )
    body = parse_body(await read_body(request))
    now = time.monotonic()
    check_store(gateway.fleet, now)
    model = choose_model(body.model, gateway.fleet, default=gateway.settings.default_model)
    check_is_served(model, gateway.fleet, now)
    order = order_images(
        body,
        limits_of(model.info, gateway.settings),
        random_seed=secrets.randbits(_RANDOM_SEED_BITS),
    )
    async with gateway.generation.submitted(
        order, job_id=request[REQUEST_ID], owner=_owner(request, body)
    ) as sent:
        if request.transport is None:
            raise ConnectionResetError("The client has gone while its order was sent.")
        with gateway.in_flight():
            respond = _stream if order.is_streamed else _answer
            return await respond(request, gateway, sent)


async def _answer(request: web.Request, gateway: Gateway, sent: Submission) -> web.Response:
    order = sent.order
    async with asyncio.timeout(_timeout_s(gateway, sent.order)):
        records = await gateway.generation.wait(sent)
    items: list[replies.ImageItem] = []
    for record in records:
        is_url = order.response_format == "url"
        image = None if is_url else await gateway.generation.read_image(record)
        outcome = _outcome(record)
        items.append(
            replies.ImageItem(
                b64_json=None if image is None else base64.b64encode(image).decode(),
                url=gateway.image_url(request, record.request_id) if is_url else None,
                request_id=record.request_id,
                seed=outcome.seed,
                skipped_steps=list(outcome.skipped_steps),
                warnings=list(outcome.warnings),
            )
        )
    first = order.images[0]
    reply = replies.ImagesReply(
        created=int(time.time()),
        data=items,
        output_format=first.output_format,
        quality=order.quality,
        size=f"{first.width}x{first.height}",
        usage=_usage(order),
        model=first.model,
        warnings=list(order.warnings),
    )
    return web.json_response(text=reply.model_dump_json(exclude_none=True))


async def _stream(request: web.Request, gateway: Gateway, sent: Submission) -> web.StreamResponse:
    """Progress as comment lines, JSON each; then the picture, or what went wrong, as an event."""
    (request_id,) = sent.request_ids
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
    )
    await response.prepare(request)
    try:
        async with asyncio.timeout(_timeout_s(gateway, sent.order)):
            while request_id in sent.watch.unfinished:
                await response.write(_progress_comment(gateway, sent))
                await _news(sent)
        record = await gateway.generation.read_done(request_id)
        event = await _completed(gateway, sent.order, record)
        await response.write(
            f"event: image_generation.completed\ndata: {event.model_dump_json()}\n\n".encode()
        )
    except ConnectionResetError:
        return response  # The client is gone: leaving cancels its request.
    except Exception as error:  # noqa: BLE001 - the head is sent: an event has to say it
        answer = from_exception(error)
        log.warning("stream failed", request_id=request_id, code=answer.code, reason=answer.message)
        detail = replies.ErrorReply(error=answer.detail).model_dump_json()
        await response.write(f"data: {detail}\n\n".encode())
    await response.write_eof()
    return response


def _timeout_s(gateway: Gateway, order: ImageOrder) -> float:
    """How long a client waits: a deadline ends it, too, should the scheduler not have done so."""
    timeout_s = gateway.settings.request_timeout_s
    if not order.deadline_ms:
        return timeout_s
    return min(timeout_s, order.deadline_ms / 1000 + _DEADLINE_SLACK_S)


async def _news(sent: Submission) -> None:
    try:
        async with asyncio.timeout(HEARTBEAT_S):
            await sent.watch.changed()
    except TimeoutError:
        return


def _progress_comment(gateway: Gateway, sent: Submission) -> bytes:
    (request_id,) = sent.request_ids
    progress = sent.watch.progress.get(request_id)
    facts = {
        "request_id": request_id,
        "state": progress.state if progress else "queued",
        "queue_position": gateway.fleet.queue_position(request_id),
        "step": progress.step if progress else 0,
        "num_steps": progress.num_steps if progress else None,
    }
    return f": {json.dumps(facts)}\n\n".encode()


async def _completed(
    gateway: Gateway, order: ImageOrder, record: RequestRecord
) -> replies.CompletedEvent:
    image = await gateway.generation.read_image(record)
    outcome = _outcome(record)
    first = order.images[0]
    return replies.CompletedEvent(
        b64_json=base64.b64encode(image).decode(),
        created_at=int(time.time()),
        output_format=first.output_format,
        quality=order.quality,
        size=f"{first.width}x{first.height}",
        usage=_usage(order),
        model=first.model,
        request_id=record.request_id,
        seed=outcome.seed,
        skipped_steps=list(outcome.skipped_steps),
        warnings=[*order.warnings, *outcome.warnings],
    )


def _outcome(record: RequestRecord) -> Outcome:
    assert record.outcome is not None, "a commit always writes one"
    return record.outcome


def _usage(order: ImageOrder) -> replies.Usage:
    text_tokens = count_prompt_tokens(order)
    output_tokens = count_latent_positions(order)
    return replies.Usage(
        input_tokens=text_tokens,
        input_tokens_details=replies.InputTokensDetails(text_tokens=text_tokens),
        output_tokens=output_tokens,
        total_tokens=text_tokens + output_tokens,
    )


def _owner(request: web.Request, body: GenerationBody) -> str:
    """Whose share of the service a request draws on: the named user's, or else the key's."""
    named = body.safety_identifier or body.user or request.headers.get("Authorization", "")
    return hashlib.sha256(named.encode(errors="surrogateescape")).hexdigest()[:16] if named else ""
