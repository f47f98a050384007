"""The HTTP server under the application: what never reaches a handler is an error object, too.

aiohttp answers some requests below the application, in plain text: those that its parser refuses,
and those that fail before or outside the middleware.
"""

from __future__ import annotations

import asyncio
import secrets
from http import HTTPStatus

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from services.gateway.http_errors import ApiError, from_exception
from shared.logs import get_logger

_BACKLOG = 1024
_CLOSE_TIMEOUT_S = 1.0
_MAX_REASON = 200

log = get_logger()


def add_common_headers(response: web.StreamResponse, request_id: str) -> None:
    """Give an answer the headers that all of them have."""
    response.headers["x-request-id"] = request_id
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Server"] = "synerdiff"


def new_request_id() -> str:
    """Return an id for one HTTP request, which nobody can guess."""
    return f"req_{secrets.token_hex(12)}"


class _Protocol(web.RequestHandler):
    """One connection."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = HTTPStatus.INTERNAL_SERVER_ERROR,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - aiohttp's words hold what the client has sent
    ) -> web.StreamResponse:
        """Return the answer to what the parser refused, or to what no handler caught."""
        if request.writer.output_size > 0:
            raise ConnectionError("An answer has begun; there can't be another one.")
        if isinstance(exc, HttpProcessingError):
            answer = _malformed(exc)
            log.info("malformed request", reason=answer.message)
        elif status == HTTPStatus.GATEWAY_TIMEOUT:
            answer = from_exception(TimeoutError())
        else:
            answer = from_exception(exc if isinstance(exc, Exception) else RuntimeError())
            log.error("bug outside of the handlers", exc_info=exc)
        response = answer.response()
        response.force_close()
        add_common_headers(response, new_request_id())
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer; aiohttp's own exceptions, such as 417, as error objects."""
        if isinstance(resp, web.HTTPException):
            answer = from_exception(resp).response()
            answer.force_close()
            resp = answer
        return await super().finish_response(request, resp, start_time)


def _malformed(error: HttpProcessingError) -> ApiError:
    if isinstance(error, LineTooLong):
        return ApiError(
            status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            message="The request line or a header is too long. Allowed: 8,190 bytes each.",
            code="header_too_large",
        )
    reason = error.message.splitlines()[0].rstrip(":. ") if error.message else "Bad request"
    printable = reason.encode("ascii", "backslashreplace").decode()[:_MAX_REASON]
    return ApiError(
        status=HTTPStatus.BAD_REQUEST,
        message=f"The request is not valid HTTP/1.1: {printable}.",
        code="malformed_http",
    )


class HttpServer:
    """Serves an application on one port.

    Bodies arrive as they were sent: whoever reads one decompresses it, within bounds.
    """

    def __init__(self, app: web.Application) -> None:
        self._runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=_CLOSE_TIMEOUT_S
        )
        self._listener: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> int:
        """Begin to serve, and return the port: the one asked for, or a free one for 0.

        Raises:
            OSError: The address can't be listened on.
        """
        await self._runner.setup()
        manager = self._runner.server
        assert manager is not None, "it is set up"
        loop = asyncio.get_running_loop()

        def connect() -> _Protocol:
            return _Protocol(
                manager,
                loop=loop,
                access_log=None,  # type: ignore[arg-type] # None turns it off
                auto_decompress=False,
            )

        self._listener = await loop.create_server(connect, host, port, backlog=_BACKLOG)
        return int(self._listener.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Take no more connections, and end those that there are; again does nothing."""
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()
