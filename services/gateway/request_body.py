"""A request's body as the client meant it: read, and decompressed, within a bound.

aiohttp would decompress as it reads, and answers what it can't with 500 or with advice to install
modules on the server.
"""

from __future__ import annotations

import zlib
from http import HTTPStatus

from aiohttp import web

from services.gateway.http_errors import ApiError
from shared.errors import InvalidRequestError

_ALLOWED = "gzip, deflate"
_WINDOW_BITS = {
    "gzip": zlib.MAX_WBITS | 16,
    "x-gzip": zlib.MAX_WBITS | 16,
    "deflate": zlib.MAX_WBITS,
}
_PLAIN = frozenset({"", "identity"})


async def read_body(request: web.Request) -> bytes:
    """Return the whole body of a request, decompressed.

    Raises:
        InvalidRequestError: It is not compressed as its header says.
        ApiError: 413, larger than `client_max_size` when decompressed; 415, another encoding.
        web.HTTPException: 413, larger than that as it was sent.
        web.RequestPayloadError: The connection's bytes make no body.
    """
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in _PLAIN | _WINDOW_BITS.keys():
        raise ApiError(
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            message=f"The 'Content-Encoding' is {encoding[:40]!r}. Allowed: {_ALLOWED}, or none.",
            code="unsupported_content_encoding",
            headers={"Accept-Encoding": _ALLOWED},
        )
    payload = await request.read()
    if encoding in _PLAIN:
        return payload
    return decompress(payload, encoding, max_bytes=request.client_max_size)


def decompress(payload: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """Return what a gzip or zlib body holds, without ever holding more than `max_bytes` of it.

    Raises:
        InvalidRequestError: It is not of that encoding, incomplete, or not all of it is.
        ApiError: 413, it holds more than `max_bytes`.
    """
    stream = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        whole = stream.decompress(payload, max_bytes + 1)
    except zlib.error as error:
        raise _not_compressed(encoding) from error
    if len(whole) > max_bytes:
        raise ApiError(
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            message=f"The body holds more than {max_bytes:,} bytes when decompressed.",
            code="body_too_large",
        )
    if not stream.eof or stream.unused_data:
        raise _not_compressed(encoding)
    return whole


def _not_compressed(encoding: str) -> InvalidRequestError:
    return InvalidRequestError(f"The 'Content-Encoding' is {encoding}, and the body is not.")
