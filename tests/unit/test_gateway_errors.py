from __future__ import annotations

import json

import pytest
from image_parameters import PARAMETERS
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from services.gateway.http_errors import failure, from_exception
from shared.errors import InvalidRequestError, OverloadedError
from shared.messages import GenerateImage
from shared.store.records import RequestRecord


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequestError("Bad.", field="n"), 400, "invalid_request"),
        (OverloadedError("Full.", retry_after_s=1.5), 429, "overloaded"),
        (OutOfMemoryError("OOM"), 503, "store_full"),
        (RedisConnectionError("gone"), 503, "store_unavailable"),
        (TimeoutError(), 504, "timeout"),
        (ZeroDivisionError("secret"), 500, "internal_error"),
    ],
)
def test_every_exception_has_a_status_and_a_code(error: Exception, status: int, code: str) -> None:
    answer = from_exception(error)
    assert (answer.status, answer.code) == (status, code)
    body = json.loads(answer.response().text or "")
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in body["error"]["message"]


def test_waits_are_rounded_up_to_seconds_and_exact_in_milliseconds() -> None:
    headers = from_exception(OverloadedError("Full.", retry_after_s=1.5)).response().headers
    assert (headers["Retry-After"], headers["retry-after-ms"]) == ("2", "1500")


@pytest.mark.parametrize(
    ("code", "status", "can_retry"),
    [
        ("cancelled", 410, False),
        ("deadline_unmeetable", 400, False),
        ("too_many_attempts", 503, True),
        ("not_finite", 500, False),
        ("", 500, False),
    ],
)
def test_a_failed_request_has_the_status_of_its_reason(
    code: str, status: int, can_retry: bool
) -> None:
    record = RequestRecord(
        request_id="img_1",
        state="failed",
        attempt="1-1",
        num_attempts=1,
        submitted_at=0.0,
        started_at=None,
        finished_at=1.0,
        request=GenerateImage(
            request_id="img_1",
            job_id="req_1",
            owner="",
            priority=0,
            deadline_ms=0,
            submitted_at=0.0,
            parameters=PARAMETERS,
        ),
        code=code,
        reason="Why.",
    )
    answer = failure(record)
    assert answer.status == status
    assert ("x-should-retry" not in answer.response().headers) == can_retry
