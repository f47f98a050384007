"""A gateway inside the test's own event loop, and clients of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from openai import AsyncOpenAI

from services.gateway.service import GatewayService
from shared.settings import GatewaySettings
from shared.streams import connect


@dataclass(frozen=True, kw_only=True)
class RunningGateway:
    """A gateway on a port of its own, and two clients of it."""

    service: GatewayService
    task: asyncio.Task[None]
    http: aiohttp.ClientSession
    openai: AsyncOpenAI

    async def ready(self) -> None:
        """Wait until pictures can be made."""
        while True:
            async with self.http.get("/readyz") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)


@asynccontextmanager
async def running_gateway(url: str, **settings: object) -> AsyncIterator[RunningGateway]:
    redis = connect(url, is_patient=False)
    service = GatewayService(redis, GatewaySettings(redis_url=url, port=0, **settings))  # type: ignore[arg-type]
    task = asyncio.create_task(service.run())
    while not service.url:
        assert not task.done(), task
        await asyncio.sleep(0.01)
    openai = AsyncOpenAI(api_key="none", base_url=f"{service.url}/v1", max_retries=0)
    try:
        async with aiohttp.ClientSession(service.url) as http, openai:
            yield RunningGateway(service=service, task=task, http=http, openai=openai)
    finally:
        service.stop()
        service.stop()
        await task
        await redis.aclose()
