"""Fixtures for every test."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from redis_server import RedisServer

from shared.store.streams import connect


def pytest_collection_finish() -> None:
    """Fixtures compute on one thread, too."""
    _compute_on_one_thread()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Whatever number of threads a test chooses, the next one begins with one."""
    _compute_on_one_thread()


def _compute_on_one_thread() -> None:
    if torch := sys.modules.get("torch"):  # not imported for tests that do without
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def redis_process() -> Iterator[RedisServer]:
    """One server process for the whole run; tests take `redis_server` instead."""
    server = RedisServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
def redis_server(redis_process: RedisServer) -> RedisServer:
    """A running Redis-protocol server that holds nothing; it may be killed and started again."""
    redis_process.flush()
    return redis_process


@pytest_asyncio.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """A connection to `redis_server`, as the services make it."""
    client = connect(redis_server.url)
    yield client
    await client.aclose()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.x folder (epsilon, PNDM, 64 pixels); not to be changed."""
    from tiny_model import make_tiny_model  # noqa: PLC0415  torch, for those who ask for it

    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))
