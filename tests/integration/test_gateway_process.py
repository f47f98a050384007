from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from redis_server import RedisServer

from shared.errors import EXIT_CONFIGURATION


@contextmanager
def gateway_process(**variables: str) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if "SYNERDIFF" not in name}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.gateway"],
        env=environment | {f"SYNERDIFF_{name}": value for name, value in variables.items()},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_process_says_where_it_listens_and_ends_cleanly_when_told(
    redis_server: RedisServer,
) -> None:
    with gateway_process(REDIS_URL=redis_server.url, PORT="0") as process:
        assert process.stderr
        log = ""
        while not (found := re.search(r"url=(http://127\.0\.0\.1:\d+)", log)):
            line = process.stderr.readline()
            assert line, log
            log += line
        assert "max_open_requests" in log
        with urllib.request.urlopen(f"{found[1]}/healthz") as response:
            assert response.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_a_bad_setting_stops_the_start_and_is_named() -> None:
    with gateway_process(PORT="high") as process:
        _, log = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "SYNERDIFF_PORT='high'" in log


def test_an_address_that_is_not_ours_stops_the_start_and_is_named(
    redis_server: RedisServer,
) -> None:
    with gateway_process(REDIS_URL=redis_server.url, HOST="192.0.2.1") as process:
        _, log = process.communicate(timeout=60)
        assert process.returncode == EXIT_CONFIGURATION
        assert "SYNERDIFF_HOST=192.0.2.1" in log
