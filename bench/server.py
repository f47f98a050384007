"""A Redis-protocol server for one benchmark, on a unix socket, gone afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen
from time import monotonic, sleep
from typing import Any, Final

from redis import Redis, RedisError

from launch.embedded_redis import find_redis_binary

START_TIMEOUT_S: Final = 30.0
PATIENCE_S: Final = 60.0
"""After this long without news from the other side, a benchmark gives up."""


@contextmanager
def private_server() -> Iterator[str]:
    """Yield the URL of an empty server, set up as the service sets up its own."""
    with tempfile.TemporaryDirectory(prefix="sd-bench-") as folder:
        socket = Path(folder) / "redis.sock"
        command = [
            str(find_redis_binary().path),
            *("--port", "0", "--unixsocket", str(socket), "--dir", folder, "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "everysec"),
            *("--maxmemory", "1gb", "--maxmemory-policy", "noeviction"),
        ]
        process = Popen(command, stdout=DEVNULL, stderr=DEVNULL)  # noqa: S603 (a path we found)
        try:
            url = f"unix://{socket}"
            _wait_until_it_answers(url, process)
            yield url
        finally:
            process.kill()
            process.wait()


def connect(url: str) -> Any:
    """Return a blocking client; its blocking reads may wait up to `PATIENCE_S`."""
    return Redis.from_url(url, protocol=2, socket_timeout=2 * PATIENCE_S)


def _wait_until_it_answers(url: str, process: Popen[bytes]) -> None:
    deadline = monotonic() + START_TIMEOUT_S
    while True:
        client = connect(url)
        try:
            client.ping()
        except RedisError:
            if process.poll() is not None or monotonic() > deadline:
                raise
            sleep(0.02)
        else:
            return
        finally:
            client.close()
