"""What a process shows of itself, and how a container's health check looks at it."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from launch.stack import reserve_port
from shared import healthcheck
from shared.probe import READINESS, Readiness, serve_probe


@pytest.fixture(scope="module")
def port() -> int:
    port = reserve_port("127.0.0.1", 0)
    serve_probe(port)
    return port


@pytest.fixture
def ready() -> Iterator[None]:
    READINESS.renew(60)
    yield
    READINESS.renew(0)


def test_readiness_lasts_only_as_long_as_it_was_said() -> None:
    readiness = Readiness()
    assert not readiness.is_ready
    readiness.renew(60)
    assert readiness.is_ready
    readiness.renew(0)
    assert not readiness.is_ready


def test_a_process_that_says_nothing_is_not_ready(port: int) -> None:
    assert not healthcheck.is_ready(port)


@pytest.mark.usefixtures("ready")
def test_a_ready_process_is_healthy(port: int) -> None:
    assert healthcheck.is_ready(port)


def test_nobody_there_is_unhealthy() -> None:
    assert not healthcheck.is_ready(reserve_port("127.0.0.1", 0))


@pytest.mark.usefixtures("ready")
def test_the_check_runs_without_any_installed_package(port: int) -> None:
    command = [sys.executable, "-I", "-S", healthcheck.__file__, str(port)]
    assert subprocess.run(command, check=False).returncode == 0
    READINESS.renew(0)
    assert subprocess.run(command, check=False).returncode == 1


def test_the_metrics_are_beside_it_and_nothing_else(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        assert b"synerdiff_worker_pairs" in reply.read()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/")
