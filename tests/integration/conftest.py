from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest_asyncio
from gateways import RunningGateway, running_gateway
from redis_server import RedisServer

StartGateway = Callable[..., Awaitable[RunningGateway]]


@pytest_asyncio.fixture
async def start_gateway(redis_server: RedisServer) -> AsyncIterator[StartGateway]:
    """Starts gateways with the settings a test wants."""
    async with AsyncExitStack() as stack:

        async def start(**settings: object) -> RunningGateway:
            return await stack.enter_async_context(running_gateway(redis_server.url, **settings))

        yield start


@pytest_asyncio.fixture
async def gateway(start_gateway: StartGateway) -> RunningGateway:
    """A gateway with the default settings."""
    return await start_gateway()
