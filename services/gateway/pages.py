"""The page at `/`, the documentation, and what they are made of. Nothing comes from elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from importlib import resources

from aiohttp import web

from services.gateway.openapi import make_openapi

_FILES = {
    "/": ("index.html", "text/html"),
    "/docs": ("docs.html", "text/html"),
    "/ui/style.css": ("style.css", "text/css"),
    "/ui/page.js": ("page.js", "text/javascript"),
    "/ui/docs.js": ("docs.js", "text/javascript"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def routes() -> list[web.RouteDef]:
    """Return a route for every file and for the interface's description."""
    folder = resources.files("services.gateway").joinpath("ui")
    made = [
        web.get(path, _serve(folder.joinpath(name).read_bytes(), content_type))
        for path, (name, content_type) in _FILES.items()
    ]
    spec = json.dumps(make_openapi()).encode()
    return [*made, web.get("/openapi.json", _serve(spec, "application/json"))]


def _serve(
    body: bytes, content_type: str
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    etag = hashlib.sha256(body).hexdigest()[:16]
    headers = {
        "Cache-Control": "no-cache",
        "ETag": f'"{etag}"',
        "Content-Security-Policy": _POLICY,
        "Referrer-Policy": "no-referrer",
    }

    async def handle(request: web.Request) -> web.Response:
        if any(known.value == etag for known in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)

    return handle
