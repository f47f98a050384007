"""What a process shows of itself, and how a container's health check looks at it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
import pytest_asyncio

from launch.stack import reserve_port
from shared import healthcheck
from shared.errors import ConfigurationError
from shared.probe import READINESS, Readiness, serving_probe


@pytest_asyncio.fixture
async def port() -> AsyncIterator[int]:
    port = reserve_port("127.0.0.1", 0)
    async with serving_probe(port):
        yield port


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


async def test_a_process_that_says_nothing_is_not_ready(port: int) -> None:
    assert not await asyncio.to_thread(healthcheck.is_ready, port)


@pytest.mark.usefixtures("ready")
async def test_a_ready_process_is_healthy(port: int) -> None:
    assert await asyncio.to_thread(healthcheck.is_ready, port)


def test_nobody_there_is_unhealthy() -> None:
    assert not healthcheck.is_ready(reserve_port("127.0.0.1", 0))


@pytest.mark.usefixtures("ready")
async def test_the_check_runs_without_any_installed_package(port: int) -> None:
    command = [sys.executable, "-I", "-S", healthcheck.__file__, str(port)]

    async def exit_code() -> int:
        return (await asyncio.to_thread(subprocess.run, command, check=False)).returncode

    assert await exit_code() == 0
    READINESS.renew(0)
    assert await exit_code() == 1


async def test_the_metrics_are_beside_it_and_nothing_else(port: int) -> None:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        async with session.get("/metrics") as reply:
            assert reply.content_type == "text/plain"
            assert "synerdiff_worker_pairs" in await reply.text()
        async with session.get("/") as reply:
            assert reply.status == 404


async def test_a_port_that_is_taken_is_named_and_0_serves_nothing() -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"SYNERDIFF_METRICS_PORT={port}"):
            async with serving_probe(port):
                pass
    async with serving_probe(0):
        assert not await asyncio.to_thread(healthcheck.is_ready, port)
