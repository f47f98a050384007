"""Many requests, all different, as a patient client sends them."""

from __future__ import annotations

import asyncio
import base64
import random
from collections import Counter

import aiohttp
from redis.asyncio import Redis

from shared.store import keys
from shared.store.records import Records

SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "lcm")


def body(number: int) -> dict[str, object]:
    """A request like no other, the same for the same number."""
    rng = random.Random(number)
    return {
        "prompt": f"picture {number}",
        "negative_prompt": rng.choice(["", "blue"]),
        "num_inference_steps": rng.randint(1, 8),
        "guidance_scale": rng.choice([1.0, 3.0, 7.5]),
        "sampler": rng.choice(SAMPLERS),
        "size": rng.choice(["64x64", "64x64", "64x128", "96x64"]),
        "output_format": rng.choice(["png", "png", "jpeg", "webp"]),
        "seed": number,
    }


async def generate(session: aiohttp.ClientSession, number: int) -> bytes:
    """As a patient client: a broken connection or a 5xx is tried again."""
    while True:
        try:
            async with session.post("/v1/images/generations", json=body(number)) as reply:
                if reply.status == 200:
                    return base64.b64decode((await reply.json())["data"][0]["b64_json"])
                assert reply.status in {429, 500, 502, 503}, await reply.text()
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.2)


async def count_states(redis: Redis) -> Counter[str]:
    records = Records(redis)
    ids = [
        key.decode().removeprefix(keys.request("")) async for key in redis.scan_iter("sd:request:*")
    ]
    found = [await records.read(request_id) for request_id in ids]
    return Counter(record.state for record in found if record)
