"""Asks a gateway for one picture and follows its progress; the standard library is enough."""

from __future__ import annotations

import base64
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

from shared.errors import SynerDiffError

SILENCE_TIMEOUT_S: Final = 60.0
"""A gateway's stream says something every few seconds; after this it is taken for dead."""


class GatewayError(SynerDiffError):
    """The gateway refused, failed, or went away."""

    code = "gateway_error"


class GatewayUnreachableError(GatewayError):
    """Nothing answers at the address."""

    code = "gateway_unreachable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a picture is."""

    state: str
    step: int
    num_steps: int
    """0 while not known."""
    queue_position: int
    """0 if it does not wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A finished picture."""

    content: bytes
    """The file as it is."""
    seed: int
    size: str
    warnings: tuple[str, ...]


def request_picture(
    url: str, body: dict[str, Any], on_progress: Callable[[Progress], None]
) -> Picture:
    """Ask for a picture, wait for it and return it. Closing the connection cancels.

    Args:
        url: The gateway's.
        body: Of `POST /v1/images/generations`, less `stream`.
        on_progress: Is told of every change.

    Raises:
        GatewayUnreachableError: Nothing answers there.
        GatewayError: With the gateway's own words.
    """
    connection = _connect(url)
    try:
        connection.connect()
    except OSError as error:
        raise GatewayUnreachableError(f"nothing answers at {url} ({error})") from error
    try:
        connection.request(
            "POST",
            f"{urlsplit(url).path.rstrip('/')}/v1/images/generations",
            body=json.dumps({**body, "stream": True}),
            headers={"Content-Type": "application/json", "Accept": "text/event-stream"},
        )
        response = connection.getresponse()
        if response.status != HTTPStatus.OK:
            raise GatewayError(_error_message(response.read(), response.status))
        for line in _lines(response):
            if line.startswith(":"):
                _report(line[1:], on_progress)
            elif line.startswith("data:"):
                return _picture(json.loads(line[5:]))
        raise GatewayError("the gateway ended the stream without a picture")
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise GatewayError(f"the connection to {url} broke: {error!r}") from error
    finally:
        connection.close()


def request_in_background(
    url: str, body: dict[str, Any], on_progress: Callable[[Progress], None]
) -> Future[Picture]:
    """Ask for a picture in a thread that does not keep an interrupted command from ending."""
    future: Future[Picture] = Future()

    def work() -> None:
        try:
            future.set_result(request_picture(url, body, on_progress))
        except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def is_ready(url: str) -> bool:
    """Return whether a gateway at `url` says that pictures can be made."""
    connection = _connect(url)
    try:
        connection.request("GET", f"{urlsplit(url).path.rstrip('/')}/readyz")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _connect(url: str) -> http.client.HTTPConnection:
    kinds: dict[str, type[http.client.HTTPConnection]] = {
        "http": http.client.HTTPConnection,
        "https": http.client.HTTPSConnection,
    }
    try:
        parts = urlsplit(url)
        return kinds[parts.scheme](parts.hostname or "", parts.port, timeout=SILENCE_TIMEOUT_S)
    except (ValueError, KeyError, http.client.InvalidURL) as error:
        raise GatewayError(
            f"{url!r} is no address; it should look like http://127.0.0.1:8000"
        ) from error


def _lines(response: http.client.HTTPResponse) -> Iterator[str]:
    while line := response.readline():
        yield line.decode().rstrip("\r\n")


def _report(comment: str, on_progress: Callable[[Progress], None]) -> None:
    try:
        facts = json.loads(comment)
    except ValueError:
        return  # some other comment, a heartbeat
    on_progress(
        Progress(
            state=facts.get("state") or "",
            step=facts.get("step") or 0,
            num_steps=facts.get("num_steps") or 0,
            queue_position=facts.get("queue_position") or 0,
        )
    )


def _picture(event: dict[str, Any]) -> Picture:
    if "error" in event:
        raise GatewayError(event["error"]["message"])
    return Picture(
        content=base64.b64decode(event["b64_json"]),
        seed=event["seed"],
        size=event["size"],
        warnings=tuple(event["warnings"]),
    )


def _error_message(payload: bytes, status: int) -> str:
    try:
        return str(json.loads(payload)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the answer is an HTTP {status}; is this a SynerDiff gateway?"
