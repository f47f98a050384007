"""Routes, and what every answer has in common: an id, an error object, metrics, safe headers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from services.gateway import jobs_api, models_api, openai_api, pages
from services.gateway.context import GATEWAY, REQUEST_ID, Gateway
from services.gateway.http_errors import from_exception
from services.gateway.http_server import add_common_headers, new_request_id
from services.gateway.replies import ReadinessReply
from shared import metrics
from shared.errors import InvalidRequestError
from shared.logs import get_logger

_CLIENT_GONE = 499

log = get_logger()


def make_app(gateway: Gateway) -> web.Application:
    """The gateway's HTTP application."""
    app = web.Application(middlewares=[_edge], client_max_size=gateway.settings.max_body_kb * 1024)
    app[GATEWAY] = gateway
    app.on_response_prepare.append(_sign)
    app.add_routes(
        [
            web.post("/v1/images/generations", openai_api.generate),
            web.get("/v1/models", models_api.list_models),
            web.get("/v1/models/{model_id:.+}", models_api.show_model),
            web.get("/v1/images/{request_id:img_[^/]+}", jobs_api.show_image),
            web.get("/v1/requests/{request_id}", jobs_api.show_request),
            web.delete("/v1/requests/{request_id}", jobs_api.cancel_request),
            web.get("/healthz", _show_health),
            web.get("/readyz", _show_readiness),
            web.get("/metrics", _show_metrics),
            *pages.routes(),
        ]
    )
    return app


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _edge(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The one place where exceptions become answers."""
    request[REQUEST_ID] = new_request_id()
    resource = request.match_info.route.resource
    route = resource.canonical if resource else "unmatched"
    method = request.method if resource else "any"  # clients must not invent label values
    began = time.monotonic()
    status = _CLIENT_GONE
    try:
        response = await _answer(request, handler)
        status = response.status
    finally:
        elapsed_s = time.monotonic() - began
        metrics.HTTP_REQUESTS.labels(method, route, str(status)).inc()
        metrics.HTTP_SECONDS.labels(route).observe(elapsed_s)
        log.debug("answered", route=route, status=status, elapsed_s=round(elapsed_s, 4))
    return response


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        _check_host(request)
        return await handler(request)
    except Exception as error:  # the edge: whatever it is becomes an answer
        answer = from_exception(error)
        if answer.code == "internal_error":
            log.exception("bug", path=request.path, request_id=request[REQUEST_ID])
        return answer.response()


def _check_host(request: web.Request) -> None:
    """Raise InvalidRequestError for a name that can't become part of links."""
    if not request.host.isascii():
        raise InvalidRequestError("The 'Host' is not a name.", allowed="ASCII characters")


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    add_common_headers(response, request.get(REQUEST_ID) or new_request_id())


async def _show_health(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _show_readiness(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    reasons = gateway.fleet.reasons_not_ready(time.monotonic())
    if gateway.is_draining:
        reasons = ("this gateway is shutting down", *reasons)
    reply = ReadinessReply(ready=not reasons, reasons=list(reasons))
    return web.json_response(text=reply.model_dump_json(), status=503 if reasons else 200)


async def _show_metrics(_: web.Request) -> web.Response:
    body, content_type = await asyncio.to_thread(metrics.render_metrics)
    return web.Response(body=body, headers={"Content-Type": content_type})
