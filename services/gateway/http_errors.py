"""Every error as a client sees it: a status, OpenAI's error object, and when to try again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from aiohttp import web
from redis.exceptions import OutOfMemoryError, RedisError

from services.gateway.replies import ErrorDetail, ErrorReply
from shared.errors import InvalidRequestError, OverloadedError, ProtocolError
from shared.records import RequestRecord

STATUS_BY_FAILURE: Mapping[str, int] = {
    "cancelled": HTTPStatus.GONE,
    "invalid_request": HTTPStatus.BAD_REQUEST,
    "deadline_unmeetable": HTTPStatus.BAD_REQUEST,
    "deadline_exceeded": HTTPStatus.GATEWAY_TIMEOUT,
    "overloaded": HTTPStatus.SERVICE_UNAVAILABLE,
    "too_many_attempts": HTTPStatus.SERVICE_UNAVAILABLE,
}
"""Statuses of a failed request by its record's code; 500 for any other."""

_RETRY = frozenset({"overloaded", "too_many_attempts"})


@dataclass(kw_only=True, eq=False)
class ApiError(Exception):
    """An answer that is an error.

    param: the request's field to blame. retry_after_s: None leaves retrying to the client's habits.
    can_retry: False tells clients that another try would end the same.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None
    can_retry: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the message."""
        return self.message

    @property
    def detail(self) -> ErrorDetail:
        """The error object's inside."""
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        elif self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            kind = "server_error"
        else:
            kind = "invalid_request_error"
        return ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)

    def response(self) -> web.Response:
        """The whole answer, `Retry-After` in seconds and in the milliseconds clients prefer."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after_s))
            headers["retry-after-ms"] = str(round(self.retry_after_s * 1000))
        if not self.can_retry:
            headers["x-should-retry"] = "false"
        return web.Response(
            status=self.status,
            text=ErrorReply(error=self.detail).model_dump_json(),
            content_type="application/json",
            headers=headers,
        )


def not_found(what: str) -> ApiError:
    """404 with a sentence."""
    return ApiError(status=HTTPStatus.NOT_FOUND, message=what, code="not_found")


def unavailable(message: str, *, code: str = "not_ready", retry_after_s: float = 2.0) -> ApiError:
    """503: nothing is wrong with the request, but not now."""
    return ApiError(
        status=HTTPStatus.SERVICE_UNAVAILABLE,
        message=message,
        code=code,
        retry_after_s=retry_after_s,
    )


def failure(record: RequestRecord) -> ApiError:
    """The error that a failed or cancelled request ended with."""
    return ApiError(
        status=STATUS_BY_FAILURE.get(record.code, HTTPStatus.INTERNAL_SERVER_ERROR),
        message=f"Request {record.request_id} {record.state}: {record.reason or record.code}",
        code=record.code or record.state,
        can_retry=record.code in _RETRY,
    )


def from_exception(error: Exception) -> ApiError:
    """The answer to an exception; what we did not raise on purpose is a bug, answered by 500."""
    match error:
        case ApiError():
            answer = error
        case InvalidRequestError():
            answer = ApiError(
                status=HTTPStatus.BAD_REQUEST,
                message=str(error),
                code=error.code,
                param=error.field,
            )
        case OverloadedError():
            answer = ApiError(
                status=HTTPStatus.TOO_MANY_REQUESTS,
                message=str(error),
                code=error.code,
                retry_after_s=error.retry_after_s,
            )
        case OutOfMemoryError():
            answer = unavailable("The store is full.", code="store_full", retry_after_s=5.0)
        case RedisError() | ConnectionError():
            answer = unavailable("The store does not answer.", code="store_unavailable")
        case ProtocolError():
            answer = ApiError(
                status=HTTPStatus.INTERNAL_SERVER_ERROR,
                message="What the store holds of this request can't be read.",
                code=error.code,
                can_retry=False,
            )
        case TimeoutError():
            answer = ApiError(
                status=HTTPStatus.GATEWAY_TIMEOUT,
                message="The pictures were not done in time; what was left has been cancelled.",
                code="timeout",
            )
        case web.HTTPException():
            answer = _from_http(error)
        case web.RequestPayloadError():
            answer = ApiError(
                status=HTTPStatus.BAD_REQUEST,
                message="The body is not framed as its headers say.",
                code="malformed_http",
            )
        case _:
            answer = ApiError(
                status=HTTPStatus.INTERNAL_SERVER_ERROR,
                message="Something went wrong here; the server's log says what.",
                code="internal_error",
            )
    return answer


_HTTP_CODES = {
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "body_too_large",
    HTTPStatus.EXPECTATION_FAILED: "expectation_failed",
}


def _from_http(error: web.HTTPException) -> ApiError:
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    match error:
        case web.HTTPNotFound():
            message = "There is nothing at this address; /docs lists what there is."
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{error.method} is not possible here. Allowed: {allowed}."
        case web.HTTPRequestEntityTooLarge():
            message = f"The body is too large. {error.text}"
        case web.HTTPExpectationFailed():
            message = "The 'Expect' is not known here. Allowed: 100-continue."
        case _:
            message = error.reason or "The request could not be served."
    return ApiError(
        status=error.status,
        message=message,
        code=_HTTP_CODES.get(HTTPStatus(error.status), "http_error"),
        headers=headers,
    )
