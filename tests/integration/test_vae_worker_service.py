"""The VAE worker's shell on a real server; the test is its scheduler: grants, cancellation."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising import parameters
from redis.asyncio import Redis

from services.vae_worker.chunk_runner import ChunkRunner
from services.vae_worker.committer import Committer
from services.vae_worker.decode_queue import Decode, PendingGrant
from services.vae_worker.service import VaeWorkerService
from services.vae_worker.unet_beside import NEXT_CHUNK_NS
from shared import messages
from shared.settings import VaeWorkerSettings
from shared.store import keys
from shared.store.streams import Streams
from shared.tensors.pool import TensorPool
from shared.tensors.wire import pack_tensor

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

    async def cancel(self, request_id: str) -> None:
        await self.tell(messages.CancelDecode(epoch=EPOCH, request_id=request_id, attempt=ATTEMPT))

    async def tell(self, message: messages.Message) -> None:
        await Streams(self.redis).send(keys.control(self.incarnation), message)

    async def hand_over(self, request_id: str, latents: torch.Tensor = LATENTS) -> None:
        """Send a decode whose latents lie in Redis."""
        key = keys.latents(request_id, ATTEMPT)
        await self.redis.hset(key, "data", pack_tensor(latents))  # type: ignore[misc]
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

    async def grant(
        self, request_id: str, chunks: int, *, pool: str = "", threads: int = 1
    ) -> None:
        await self.tell(
            messages.GrantChunks(
                epoch=EPOCH,
                request_id=request_id,
                attempt=ATTEMPT,
                chunks=chunks,
                threads=threads,
                pool=pool,
            )
        )


@asynccontextmanager
async def working(
    redis: Redis, folder: Path, *, threads: int = 1
) -> AsyncIterator[tuple[VaeWorkerService, Desk]]:
    settings = VaeWorkerSettings(
        model=folder,
        device="cpu",
        dtype="float32",
        threads=threads,
        worker_id="v",
        num_chunks=8,
        max_strip_fraction=0.2,
    )
    service, desk = VaeWorkerService(redis, settings), Desk(redis)
    task = asyncio.create_task(service.run())
    worker = (await desk.hear(messages.WorkerRegistered)).worker
    assert worker.max_decodes == threads
    desk.incarnation, desk.num_chunks = worker.incarnation, worker.num_chunks
    try:
        yield service, desk
    finally:
        service.stop()
        service.stop()
        await task


class Chunks:
    """Stands in for how a chunk is run: it notes each, and may hold or fail those of a request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.most_at_once = 0
        self.may_go_on = threading.Event()
        self.held: set[str] = set()
        self.failing: set[str] = set()
        self._running = 0
        self._lock = threading.Lock()
        run_chunk = ChunkRunner._run_chunk

        def run(runner: ChunkRunner, decode: Decode, grant: PendingGrant, share: float) -> Any:
            request_id = decode.command.request_id
            with self._lock:
                self._running += 1
                self.most_at_once = max(self.most_at_once, self._running)
                self.ran.append(request_id)
            try:
                if request_id in self.held:
                    assert self.may_go_on.wait(60)
                if request_id in self.failing:
                    raise RuntimeError("a chunk that fails")
                return run_chunk(runner, decode, grant, share)
            finally:
                with self._lock:
                    self._running -= 1

        monkeypatch.setattr(ChunkRunner, "_run_chunk", run)

    async def until(self, *request_ids: str) -> None:
        """Wait until a chunk of each has begun."""
        async with asyncio.timeout(60):
            while not set(request_ids) <= set(self.ran):  # noqa: ASYNC110 - other threads run
                await asyncio.sleep(0.01)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chunks]:
    chunks = Chunks(monkeypatch)
    yield chunks
    chunks.may_go_on.set()


async def test_a_decode_runs_as_many_chunks_as_are_granted(
    redis: Redis, tiny_model_folder: Path
) -> None:
    async with working(redis, tiny_model_folder) as (_, desk):
        await desk.hand_over("a")
        await desk.grant("a", 3)
        assert (await desk.hear(messages.ChunksDecoded)).chunks_done == 3
        await desk.grant("a", desk.num_chunks)
        assert (await desk.hear(messages.ChunksDecoded)).chunks_done == desk.num_chunks


async def test_decodes_whose_grants_have_come_run_side_by_side(
    redis: Redis, tiny_model_folder: Path, chunks: Chunks
) -> None:
    chunks.held = {"a", "b"}
    async with working(redis, tiny_model_folder, threads=2) as (_, desk):
        for name in ("a", "b", "c"):
            await desk.hand_over(name)
            await desk.grant(name, desk.num_chunks)
        await chunks.until("a", "b")
        chunks.may_go_on.set()
        done = [(await desk.hear(messages.ChunksDecoded)).request_id for _ in range(3)]
    assert sorted(done) == ["a", "b", "c"]
    assert chunks.most_at_once == 2, "a CPU thread each, and there are two"
    assert chunks.ran.index("c") > max(chunks.ran.index("a"), chunks.ran.index("b"))


async def test_on_one_thread_decodes_run_one_after_another_as_they_came(
    redis: Redis, tiny_model_folder: Path, chunks: Chunks
) -> None:
    chunks.held = {"a"}
    async with working(redis, tiny_model_folder) as (_, desk):
        for name in ("a", "b"):
            await desk.hand_over(name)
            await desk.grant(name, desk.num_chunks)
        await chunks.until("a")
        chunks.may_go_on.set()
        done = [(await desk.hear(messages.ChunksDecoded)).request_id for _ in range(2)]
    assert done == ["a", "b"]
    assert chunks.most_at_once == 1


async def test_pictures_decoded_side_by_side_are_those_of_decodes_alone(
    redis: Redis, tiny_model_folder: Path, chunks: Chunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: dict[str, torch.Tensor] = {}
    commit = Committer.commit

    async def keep(committer: Committer, decode: Decode, image: torch.Tensor) -> bool:
        pictures[decode.command.request_id] = image
        return await commit(committer, decode, image)

    monkeypatch.setattr(Committer, "commit", keep)
    generator = torch.Generator().manual_seed(7)
    latents = [torch.randn(LATENTS.shape, generator=generator) for _ in range(2)]
    async with working(redis, tiny_model_folder, threads=2) as (_, desk):
        for number, sample in enumerate(latents):
            await desk.hand_over(f"alone-{number}", sample)
            await desk.grant(f"alone-{number}", desk.num_chunks)
            await desk.hear(messages.CommitRefused)
        chunks.held = {"beside-0", "beside-1"}
        for number, sample in enumerate(latents):
            await desk.hand_over(f"beside-{number}", sample)
            await desk.grant(f"beside-{number}", desk.num_chunks)
        await chunks.until("beside-0", "beside-1")
        chunks.may_go_on.set()
        for _ in range(2):
            await desk.hear(messages.CommitRefused)
    assert chunks.most_at_once == 2
    assert not torch.equal(pictures["alone-0"], pictures["alone-1"])
    for number in range(2):
        assert torch.equal(pictures[f"beside-{number}"], pictures[f"alone-{number}"])


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
    redis: Redis, tiny_model_folder: Path, chunks: Chunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def look_inside(*_: object) -> None:
        seen.append(pool.has_chunks_beside(time.monotonic_ns()))

    pool = TensorPool(f"unet-{uuid.uuid4().hex[:8]}", num_slots=1, slot_bytes=64)
    try:
        async with working(redis, tiny_model_folder) as (_, desk):
            monkeypatch.setattr("services.vae_worker.chunk_runner.finish_work", look_inside)
            chunks.held = {"a"}
            await desk.hand_over("a")
            await desk.grant("a", 1, pool=pool.name)
            await chunks.until("a")
            assert not pool.has_chunks_beside(time.monotonic_ns())
            chunks.may_go_on.set()
            await desk.hear(messages.ChunksDecoded)
        assert seen == [True]
        assert not pool.has_chunks_beside(time.monotonic_ns() + NEXT_CHUNK_NS)
    finally:
        pool.close()


async def test_a_worker_whose_gpu_is_lost_ends_instead_of_failing_decodes(
    redis: Redis, tiny_model_folder: Path, chunks: Chunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_asked = threading.Event()

    def fail_to_finish(*_: object) -> None:
        is_asked.set()
        raise RuntimeError("CUDA error: unspecified launch failure")

    heard_until: list[str] = []

    async def until_it_is_lost() -> None:
        async with working(redis, tiny_model_folder) as (_, desk):
            chunks.failing = {"r", "s"}
            await desk.hand_over("r")
            await desk.grant("r", 1)
            # The device works, so it is the request's own fault.
            assert (await desk.hear(messages.RequestFailed)).request_id == "r"
            monkeypatch.setattr("services.vae_worker.decodes.finish_work", fail_to_finish)
            await desk.hand_over("s")
            await desk.grant("s", 1)
            assert await asyncio.to_thread(is_asked.wait, 60)
            heard_until.append(desk.position)

    with pytest.raises(ExceptionGroup) as ended:
        await until_it_is_lost()
    assert ended.group_contains(RuntimeError, match="CUDA error")
    entries = await Streams(redis).read({keys.SCHEDULER: heard_until[0]}, count=64)
    assert not [one for one in entries if isinstance(one.message, messages.RequestFailed)]


@pytest.mark.parametrize("threads", [1, 2])
async def test_a_cancelled_decode_stops_within_one_chunk_and_leaves_the_other(
    redis: Redis, tiny_model_folder: Path, chunks: Chunks, threads: int
) -> None:
    chunks.held = {"cancelled", "other"}
    async with working(redis, tiny_model_folder, threads=threads) as (service, desk):
        for name in ("cancelled", "other"):
            await desk.hand_over(name)
            await desk.grant(name, desk.num_chunks)
        await chunks.until("cancelled", *(["other"] if threads == 2 else []))
        await desk.cancel("cancelled")
        async with asyncio.timeout(60):
            while len(service._decodes.queue) > 1:  # noqa: ASYNC110 - a plain dict
                await asyncio.sleep(0.01)
        chunks.may_go_on.set()
        done = await desk.hear(messages.ChunksDecoded)
        assert (done.request_id, done.chunks_done) == ("other", desk.num_chunks)
    assert chunks.ran.count("cancelled") == 1
    assert chunks.ran.count("other") == desk.num_chunks


async def test_a_decode_that_fails_leaves_the_other(
    redis: Redis, tiny_model_folder: Path, chunks: Chunks
) -> None:
    chunks.held = {"failing", "other"}
    chunks.failing = {"failing"}
    async with working(redis, tiny_model_folder, threads=2) as (_, desk):
        for name in ("failing", "other"):
            await desk.hand_over(name)
            await desk.grant(name, desk.num_chunks)
        await chunks.until("failing", "other")
        chunks.may_go_on.set()
        failed = await desk.hear(messages.RequestFailed)
        assert (failed.request_id, failed.code) == ("failing", "decode_failed")
        desk.position = "0"
        done = await desk.hear(messages.ChunksDecoded)
        assert (done.request_id, done.chunks_done) == ("other", desk.num_chunks)
        assert (await desk.hear(messages.CommitRefused)).request_id == "other"


async def test_a_picture_that_is_not_finite_leaves_the_other(
    redis: Redis, tiny_model_folder: Path, chunks: Chunks
) -> None:
    chunks.held = {"broken", "other"}
    async with working(redis, tiny_model_folder, threads=2) as (_, desk):
        await desk.hand_over("broken", torch.full_like(LATENTS, torch.nan))
        await desk.hand_over("other")
        for name in ("broken", "other"):
            await desk.grant(name, desk.num_chunks)
        await chunks.until("broken", "other")
        chunks.may_go_on.set()
        assert (await desk.hear(messages.RequestFailed)).request_id == "broken"
        desk.position = "0"
        assert (await desk.hear(messages.CommitRefused)).request_id == "other"


async def test_a_new_epoch_drops_what_runs(
    redis: Redis, tiny_model_folder: Path, chunks: Chunks
) -> None:
    chunks.held = {"a"}
    async with working(redis, tiny_model_folder, threads=2) as (service, desk):
        await desk.hand_over("a")
        await desk.grant("a", desk.num_chunks)
        await chunks.until("a")
        await desk.tell(messages.BeginEpoch(epoch=EPOCH))
        async with asyncio.timeout(60):
            while len(service._decodes.queue):  # noqa: ASYNC110 - a plain dict
                await asyncio.sleep(0.01)
        await desk.hand_over("a")
        await desk.grant("a", desk.num_chunks)
        chunks.may_go_on.set()
        done = await desk.hear(messages.ChunksDecoded)
        assert done.chunks_done == desk.num_chunks
    assert chunks.ran.count("a") == 1 + desk.num_chunks, "begun anew, and the first one is over"
