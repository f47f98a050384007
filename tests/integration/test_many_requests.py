"""500 mixed requests in one go on the real stack: 500 pictures, none lost, none twice."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from many_requests import body, count_states, generate
from PIL import Image
from running_up import Up
from tiny_model import make_tiny_model

from shared.store.streams import connect

NUM_REQUESTS = 500
REFUSED = (
    {"size": "4096x4096"},
    {"num_inference_steps": 0},
    {"sampler": "magic"},
    {"guidance_scale": "much"},
)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up.start(make_tiny_model(tmp_path / "tiny"), tmp_path / "d")
    yield up
    up.process.kill()
    up.process.wait()


async def refused_field(session: aiohttp.ClientSession, change: dict[str, object]) -> str:
    async with session.post("/v1/images/generations", json=body(0) | change) as reply:
        assert reply.status == 400
        param: str = (await reply.json())["error"]["param"]
        return param


async def serve_all(up: Up) -> None:
    timeout = aiohttp.ClientTimeout(total=280)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(up.url, timeout=timeout, connector=connector) as session:
        wanted = [asyncio.create_task(generate(session, number)) for number in range(NUM_REQUESTS)]
        for change in REFUSED:
            assert await refused_field(session, change) == next(iter(change))
        pictures = [Image.open(io.BytesIO(content)) for content in await asyncio.gather(*wanted)]
    for number, picture in enumerate(pictures):
        order = body(number)
        assert "x".join(map(str, picture.size)) == order["size"]
        assert (picture.format or "").lower() == order["output_format"]
    assert len({picture.tobytes() for picture in pictures}) == NUM_REQUESTS
    async with connect(f"unix://{up.data_dir}/redis.sock") as redis:
        assert await count_states(redis) == {"done": NUM_REQUESTS}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_500_mixed_requests_become_500_pictures(up: Up) -> None:
    up.wait_ready()
    asyncio.run(serve_all(up))
    assert "Traceback" not in up.said()
