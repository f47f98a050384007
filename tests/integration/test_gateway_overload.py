"""More work than there is time for: what is accepted is answered in time, the rest is refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest_asyncio
from fake_backend import FakeBackend, write_status
from gateways import RunningGateway
from redis_server import RedisServer

from shared import keys
from shared.messages import GenerateImage

PICTURE_S = 0.05
TIMEOUT_S = 6.0
OVERLOAD = 5
LOAD_S = 8.0


class SerialBackend(FakeBackend):
    """One server that makes a picture at a time, oldest first, and tells its backlog."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._turn = asyncio.Lock()
        self._open = 0

    async def _make(self, request: GenerateImage) -> None:
        self._open += 1
        try:
            async with self._turn:
                await asyncio.sleep(PICTURE_S)
                await super()._make(request)
        finally:
            self._open -= 1

    async def tell(self) -> None:
        """Write the status twice a second, for ever."""
        speed = {"row_ms": PICTURE_S * 1000 / 2, "decode_ms": 0.0, "overhead_ms": 0.0}
        while True:
            backlog_ms = self._open * PICTURE_S * 1000
            await write_status(
                self.redis,
                [],
                capacity={"fake": {"backlog_ms": backlog_ms, **speed}},
                ttl_s=keys.STATUS_TTL_S,
            )
            await asyncio.sleep(0.5)


@pytest_asyncio.fixture
async def overloaded(redis_server: RedisServer, start_gateway) -> AsyncIterator[RunningGateway]:
    backend = SerialBackend(redis_server.url)
    async with backend.running():
        telling = asyncio.create_task(backend.tell())
        gateway = await start_gateway(request_timeout_s=TIMEOUT_S)
        await gateway.ready()
        yield gateway
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def test_under_five_times_the_load_the_accepted_are_answered_and_the_rest_refused(
    overloaded,
) -> None:
    answers: Counter[tuple[int, bool]] = Counter()

    async def ask(number: int) -> None:
        body = {"prompt": "a cat", "num_inference_steps": 1, "seed": number, "size": "128x128"}
        async with overloaded.http.post("/v1/images/generations", json=body) as response:
            answers[response.status, "Retry-After" in response.headers] += 1

    async with asyncio.TaskGroup() as clients:
        for number in range(round(OVERLOAD * LOAD_S / PICTURE_S)):
            clients.create_task(ask(number))
            await asyncio.sleep(PICTURE_S / OVERLOAD)
    assert set(answers) == {(200, False), (429, True)}
    assert answers[200, False] > 0.5 * LOAD_S / PICTURE_S
