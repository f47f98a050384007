"""The VAE worker's shell on a real server; the test is its scheduler: grants, cancellation."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising import parameters
from redis.asyncio import Redis

from services.vae_worker.service import NEXT_CHUNK_NS, Decode, VaeWorkerService
from shared import keys, messages
from shared.settings import VaeWorkerSettings
from shared.streams import Streams
from shared.tensor_bytes import pack_tensor
from shared.tensor_pool import TensorPool

ATTEMPT = "1-1"
EPOCH = 1
LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Desk:
    """The scheduler's side of one worker."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.position = "0"
        self.incarnation = ""
        self.num_chunks = 0

    async def hear(self, kind: type[messages.Message]) -> Any:
        """The next message of a kind; others are let go."""
        async with asyncio.timeout(60):
            while True:
                entries = await Streams(self.redis).read(
                    {keys.SCHEDULER: self.position}, count=1, block_ms=200
                )
                for entry in entries:
                    self.position = entry.entry_id
                    if isinstance(entry.message, kind):
                        return entry.message

    async def tell(self, message: messages.Message) -> None:
        await Streams(self.redis).send(keys.control(self.incarnation), message)

    async def hand_over(self, request_id: str) -> None:
        """Send a decode whose latents lie in Redis."""
        key = keys.latents(request_id, ATTEMPT)
        await self.redis.hset(key, "data", pack_tensor(LATENTS))  # type: ignore[misc]
        handle = messages.TensorHandle(
            kind="inline",
            pool="",
            owner="",
            host="",
            slot=-1,
            generation=0,
            shape=tuple(LATENTS.shape),
            dtype="float32",
            inline_key=key,
        )
        await self.tell(
            messages.DecodeLatents(
                epoch=EPOCH,
                request_id=request_id,
                attempt=ATTEMPT,
                handle=handle,
                transport="inline",
                parameters=parameters(),
                skipped_steps=(),
                warnings=(),
                release_to="",
            )
        )

    async def grant(self, request_id: str, chunks: int, *, pool: str = "") -> None:
        await self.tell(
            messages.GrantChunks(
                epoch=EPOCH,
                request_id=request_id,
                attempt=ATTEMPT,
                chunks=chunks,
                threads=1,
                pool=pool,
            )
        )


@asynccontextmanager
async def working(redis: Redis, folder: Path) -> AsyncIterator[tuple[VaeWorkerService, Desk]]:
    settings = VaeWorkerSettings(
        model=folder,
        device="cpu",
        dtype="float32",
        threads=1,
        worker_id="v",
        num_chunks=8,
        max_strip_fraction=0.2,
    )
    service, desk = VaeWorkerService(redis, settings), Desk(redis)
    task = asyncio.create_task(service.run())
    worker = (await desk.hear(messages.WorkerRegistered)).worker
    desk.incarnation, desk.num_chunks = worker.incarnation, worker.num_chunks
    try:
        yield service, desk
    finally:
        service.stop()
        service.stop()
        await task


async def test_a_decode_runs_as_many_chunks_as_are_granted(
    redis: Redis, tiny_model_folder: Path
) -> None:
    async with working(redis, tiny_model_folder) as (_, desk):
        await desk.hand_over("a")
        await desk.grant("a", 3)
        assert (await desk.hear(messages.ChunksDecoded)).chunks_done == 3
        await desk.grant("a", desk.num_chunks)
        assert (await desk.hear(messages.ChunksDecoded)).chunks_done == desk.num_chunks


async def test_a_worker_that_is_asked_what_it_holds_drops_its_decodes_and_says_so(
    redis: Redis, tiny_model_folder: Path
) -> None:
    async with working(redis, tiny_model_folder) as (_, desk):
        await desk.hand_over("a")
        await desk.grant("a", 3)
        assert (await desk.hear(messages.ChunksDecoded)).num_chunks == desk.num_chunks
        # Of the same epoch, as often as it is asked.
        for _ in range(2):
            await desk.tell(messages.BeginEpoch(epoch=EPOCH))
            announced = await desk.hear(messages.WorkerAnnounced)
            assert (announced.epoch, announced.held) == (EPOCH, ())
        await desk.hand_over("a")
        await desk.grant("a", 2)
        assert (await desk.hear(messages.ChunksDecoded)).chunks_done == 2


async def test_the_unet_worker_is_told_while_chunks_of_its_device_run(
    redis: Redis, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    advance = VaeWorkerService._advance

    def look(self: VaeWorkerService, decode: Decode) -> torch.Tensor | None:
        seen.append(pool.has_chunks_beside(time.monotonic_ns()))
        return advance(self, decode)

    def look_inside(*_: object) -> None:
        seen.append(pool.has_chunks_beside(time.monotonic_ns()))

    monkeypatch.setattr(VaeWorkerService, "_advance", look)
    monkeypatch.setattr("services.vae_worker.service.finish_work", look_inside)
    pool = TensorPool(f"unet-{uuid.uuid4().hex[:8]}", num_slots=1, slot_bytes=64)
    try:
        async with working(redis, tiny_model_folder) as (_, desk):
            await desk.hand_over("a")
            await desk.grant("a", 1, pool=pool.name)
            await desk.hear(messages.ChunksDecoded)
        assert seen == [False, True]
        assert not pool.has_chunks_beside(time.monotonic_ns() + NEXT_CHUNK_NS)
    finally:
        pool.close()


async def test_a_worker_whose_gpu_is_lost_ends_instead_of_failing_decodes(
    redis: Redis, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_asked = threading.Event()

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    def fail_to_finish(*_: object) -> None:
        is_asked.set()
        fail()

    heard_until: list[str] = []

    async def until_it_is_lost() -> None:
        async with working(redis, tiny_model_folder) as (_, desk):
            monkeypatch.setattr(VaeWorkerService, "_advance", fail)
            await desk.hand_over("r")
            await desk.grant("r", 1)
            # The device works, so it is the request's own fault.
            assert (await desk.hear(messages.RequestFailed)).request_id == "r"
            monkeypatch.setattr("services.vae_worker.service.finish_work", fail_to_finish)
            await desk.hand_over("s")
            await desk.grant("s", 1)
            assert await asyncio.to_thread(is_asked.wait, 60)
            heard_until.append(desk.position)

    with pytest.raises(ExceptionGroup) as ended:
        await until_it_is_lost()
    assert ended.group_contains(RuntimeError, match="CUDA error")
    entries = await Streams(redis).read({keys.SCHEDULER: heard_until[0]}, count=64)
    assert not [one for one in entries if isinstance(one.message, messages.RequestFailed)]


async def test_a_cancelled_decode_stops_within_one_chunk(
    redis: Redis, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    may_go_on = threading.Event()
    advance = VaeWorkerService._advance

    def slow(self: VaeWorkerService, decode: Decode) -> torch.Tensor | None:
        ran.append(decode.command.request_id)
        assert may_go_on.wait(60)
        return advance(self, decode)

    monkeypatch.setattr(VaeWorkerService, "_advance", slow)
    async with working(redis, tiny_model_folder) as (service, desk):
        for name in ("cancelled", "other"):
            await desk.hand_over(name)
            await desk.grant(name, desk.num_chunks)
        async with asyncio.timeout(60):
            while not ran:  # noqa: ASYNC110 - it is another thread that runs
                await asyncio.sleep(0.01)
            await desk.tell(
                messages.CancelDecode(epoch=EPOCH, request_id="cancelled", attempt=ATTEMPT)
            )
            while not any(  # noqa: ASYNC110 - a plain deque
                isinstance(message, messages.CancelDecode) for message in service._link.control
            ):
                await asyncio.sleep(0.01)
        may_go_on.set()
        done = await desk.hear(messages.ChunksDecoded)
        assert (done.request_id, done.chunks_done) == ("other", desk.num_chunks)
    assert ran == ["cancelled", *["other"] * desk.num_chunks]
