"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from redis_server import RedisServer

from shared.streams import connect


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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors are computed on one thread."""
    yield from _threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Tensors are computed on two threads."""
    yield from _threads(2)


def _threads(number: int) -> Iterator[None]:
    import torch  # noqa: PLC0415  for those who ask for it

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)
