"""What is wrong with a request is said in one form, whatever it is: a 4xx with an error object."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import structlog
from fake_backend import FakeBackend
from gateways import RunningGateway
from redis_server import RedisServer

from services.gateway.service import GatewayService
from shared.errors import ConfigurationError
from shared.settings import GatewaySettings
from shared.streams import connect

GENERATIONS = "/v1/images/generations"
BODY = b'{"prompt": "a cat", "num_inference_steps": 1}'


@pytest_asyncio.fixture
async def ready(redis_server: RedisServer, gateway) -> AsyncIterator[RunningGateway]:
    async with FakeBackend(redis_server.url).running():
        await gateway.ready()
        yield gateway


async def exchange(gateway: RunningGateway, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """The first answer to some bytes: its status, headers and body."""
    port = int(gateway.service.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        status, *lines = head.decode().splitlines()
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    finally:
        writer.close()
    return int(status.split()[1]), headers, body


def post(*headers: bytes, body: bytes = BODY) -> bytes:
    fixed = (b"Host: x", b"Content-Type: application/json", *headers)
    return b"\r\n".join((b"POST /v1/images/generations HTTP/1.1", *fixed, b"", body))


def sized(body: bytes, *headers: bytes) -> bytes:
    return post(b"Content-Length: %d" % len(body), *headers, body=body)


def get(path: bytes, *headers: bytes, method: bytes = b"GET") -> bytes:
    return b"\r\n".join((b"%s %s HTTP/1.1" % (method, path), b"Host: x", *headers, b"", b""))


MALFORMED = {
    "no HTTP at all": (b"hello\r\n\r\n", 400, "malformed_http"),
    "a TLS handshake": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, "malformed_http"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "malformed_http"),
    "a long request line": (get(b"/" + b"a" * 9_000), 431, "header_too_large"),
    "a long header": (get(b"/healthz", b"X-A: " + b"a" * 9_000), 431, "header_too_large"),
    "many headers": (
        get(b"/healthz", *[b"X-%d: a" % i for i in range(200)]),
        400,
        "malformed_http",
    ),
    "a header without a colon": (get(b"/healthz", b"odd"), 400, "malformed_http"),
    "no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400, "malformed_http"),
    "two lengths": (post(b"Content-Length: 1", b"Content-Length: 2"), 400, "malformed_http"),
    "a length that is none": (post(b"Content-Length: many"), 400, "malformed_http"),
    "a length and chunks": (
        post(b"Content-Length: 3", b"Transfer-Encoding: chunked"),
        400,
        "malformed_http",
    ),
    "another transfer encoding": (post(b"Transfer-Encoding: zstd"), 400, "malformed_http"),
    "bad chunks": (post(b"Transfer-Encoding: chunked", body=b"zz\r\n"), 400, "malformed_http"),
    "bad chunks later on": (
        post(b"Transfer-Encoding: chunked", body=b"2\r\n{}\r\nzz\r\n"),
        400,
        "malformed_http",
    ),
    "an odd expectation": (sized(BODY, b"Expect: a-miracle"), 417, "expectation_failed"),
    "an odd expectation at no address": (
        get(b"/nothing", b"Expect: a-miracle"),
        417,
        "expectation_failed",
    ),
    "an upgrade": (
        get(GENERATIONS.encode(), b"Connection: Upgrade", b"Upgrade: websocket"),
        405,
        "method_not_allowed",
    ),
    "an upgrade with a bad key": (
        get(b"/nothing", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: x"),
        404,
        "not_found",
    ),
    "no address": (get(b"/nothing"), 404, "not_found"),
    "an address that is no text": (get(b"/v1/models/%ff%fe"), 404, "model_not_found"),
    "a picture whose id is no text": (get(b"/v1/images/img_%ff"), 404, "not_found"),
    "every address": (get(b"*", method=b"OPTIONS"), 404, "not_found"),
    "a tunnel": (get(b"example.org:443", method=b"CONNECT"), 404, "not_found"),
    "another method": (get(GENERATIONS.encode(), method=b"TRACE"), 405, "method_not_allowed"),
    "an unknown method": (get(GENERATIONS.encode(), method=b"BREW"), 400, "malformed_http"),
    "an odd port": (get(b"http://x:99999/healthz"), 400, "malformed_http"),
    "no type": (
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
        415,
        "unsupported_media_type",
    ),
    "zstd": (
        sized(b"\x28\xb5\x2f\xfd", b"Content-Encoding: zstd"),
        415,
        "unsupported_content_encoding",
    ),
    "br": (sized(b"\x0b\x16\x80", b"Content-Encoding: br"), 415, "unsupported_content_encoding"),
    "gzip twice": (
        sized(gzip.compress(gzip.compress(BODY)), b"Content-Encoding: gzip, gzip"),
        415,
        "unsupported_content_encoding",
    ),
    "plain called gzip": (sized(BODY, b"Content-Encoding: gzip"), 400, "invalid_request"),
    "plain called deflate": (sized(BODY, b"Content-Encoding: deflate"), 400, "invalid_request"),
    "half a gzip": (
        sized(gzip.compress(BODY)[:-9], b"Content-Encoding: gzip"),
        400,
        "invalid_request",
    ),
    "a gzip and more": (
        sized(gzip.compress(BODY) + b"!", b"Content-Encoding: gzip"),
        400,
        "invalid_request",
    ),
    "a gzip of a gigabyte's kind": (
        sized(gzip.compress(bytes(50_000_000)), b"Content-Encoding: gzip"),
        413,
        "body_too_large",
    ),
}


async def test_what_is_wrong_with_a_request_is_an_error_object(ready) -> None:
    wrong = {
        name: answer
        for name, (sent, status, code) in MALFORMED.items()
        if not is_error_object(answer := await exchange(ready, sent), status, code)
    }
    assert not wrong


def is_error_object(answer: tuple[int, dict[str, str], bytes], status: int, code: str) -> bool:
    answered, headers, body = answer
    if (answered, headers["content-type"].partition(";")[0]) != (status, "application/json"):
        return False
    error = json.loads(body)["error"]
    return (
        set(error) == {"message", "type", "param", "code"}
        and error["type"] == "invalid_request_error"
        and error["code"] == code
        and headers["x-request-id"].startswith("req_")
    )


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)],
)
async def test_a_compressed_body_is_understood(ready, encoding, compress) -> None:
    header = f"Content-Encoding: {encoding}".encode()
    status, _, body = await exchange(ready, sized(compress(BODY), header))
    assert (status, len(json.loads(body)["data"])) == (200, 1)


async def test_a_body_that_is_expected_is_asked_for(ready) -> None:
    status, _, _ = await exchange(ready, sized(BODY, b"Expect: 100-continue"))
    assert status == 100


async def test_headers_that_are_no_text_do_no_harm(ready) -> None:
    status, _, _ = await exchange(ready, sized(BODY, b"Authorization: \xff", b"Cookie: \xfe"))
    assert status == 200
    status, _, body = await exchange(ready, sized(BODY).replace(b"Host: x", b"Host: \xff"))
    assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_request")


async def test_a_malformed_request_is_a_line_of_the_log_and_no_traceback(ready, caplog) -> None:
    with structlog.testing.capture_logs() as lines:
        await exchange(ready, b"hello\r\n\r\n")
    assert [line["event"] for line in lines] == ["malformed request"]
    assert not caplog.records


@pytest.mark.parametrize(("host", "is_warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
async def test_listening_to_everybody_without_keys_is_warned_of(
    start_gateway, host, is_warned
) -> None:
    with structlog.testing.capture_logs() as lines:
        await start_gateway(host=host)
    warnings = [line["event"] for line in lines if line["log_level"] == "warning"]
    assert any("without keys" in warning for warning in warnings) == is_warned


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70, "203.0.113.1"])
async def test_an_address_that_can_not_be_listened_on_is_named(redis_server, host) -> None:
    redis = connect(redis_server.url)
    service = GatewayService(redis, GatewaySettings(redis_url=redis_server.url, host=host, port=0))
    with pytest.raises(ConfigurationError, match=f"SYNERDIFF_HOST={host}"):
        await service.run()
    await redis.aclose()
