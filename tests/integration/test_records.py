"""Records on a real server whose memory is full: what is open can still end."""

from __future__ import annotations

import time

import pytest
from fake_backend import paint
from image_parameters import PARAMETERS
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError
from redis_server import RedisServer

from shared.messages import GenerateImage, ImageDecoded
from shared.records import Commit, JobRecord, Outcome, Records
from shared.streams import connect


@pytest.fixture
def records(redis: Redis) -> Records:
    return Records(redis)


async def submit(records: Records, request_id: str) -> None:
    request = GenerateImage(
        request_id=request_id,
        job_id=request_id,
        owner="",
        priority=0,
        deadline_ms=0,
        submitted_at=time.time(),
        parameters=PARAMETERS,
    )
    job = JobRecord(job_id=request_id, request_ids=(request_id,))
    assert await records.submit(job, [request], max_open=10)


@pytest.fixture
async def full(redis: Redis, records: Records):
    """Two open requests, and no byte left for a third."""
    for request_id in ("a", "b"):
        await submit(records, request_id)
    await redis.config_set("maxmemory", "1")
    yield redis
    await redis.config_set("maxmemory", "0")


async def test_nothing_is_accepted(full: Redis, redis_server: RedisServer) -> None:
    client = connect(redis_server.url, is_patient=False)
    with pytest.raises(OutOfMemoryError):
        await submit(Records(client), "c")
    await client.aclose()


async def test_a_request_can_be_cancelled(full: Redis, records: Records) -> None:
    assert await records.cancel("a", reason="gone")
    assert await records.states(["a", "b"]) == ["cancelled", "queued"]
    assert await records.open_requests() == 1


async def test_a_picture_can_be_committed(full: Redis, records: Records) -> None:
    assert await records.begin_attempt("a", "1-1")
    image = paint(PARAMETERS)
    commit = Commit(
        decoded=ImageDecoded(
            incarnation="vae", request_id="a", attempt="1-1", decode_ms=1.0, transport="shm"
        ),
        image=image,
        outcome=Outcome(content_type="image/png", size_bytes=len(image), seed=1),
    )
    assert await records.commit(commit)
    record = await records.read("a")
    assert record
    assert record.state == "done"
    assert await records.read_image(record) == image
