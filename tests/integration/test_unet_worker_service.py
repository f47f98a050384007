"""The UNet worker's shell on a real server; the test is its scheduler: full pools, draining."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from denoising import parameters
from redis.asyncio import Redis

from services.unet_worker.denoiser import Denoiser
from services.unet_worker.service import UnetWorkerService
from shared import keys, messages
from shared.settings import UnetWorkerSettings, WorkerSettings
from shared.streams import Streams
from shared.tensor_bytes import unpack_tensor
from shared.watchdog import Watchdog
from shared.worker import WorkerLink

M = TypeVar("M", bound=messages.Message)
ATTEMPT = "1-1"
EPOCH = 1


@dataclass
class Desk:
    """The scheduler's side of one worker."""

    redis: Redis
    incarnation: str = ""
    heard: list[messages.Message] = field(default_factory=list)
    position: str = "0"
    seq: int = 0

    async def hear(self, kind: type[M], *, is_it: Callable[[M], bool] = lambda _: True) -> M:
        """The next message of a kind that nobody has taken yet; the others wait."""
        async with asyncio.timeout(120):
            while True:
                for message in self.heard:
                    if isinstance(message, kind) and is_it(message):
                        self.heard.remove(message)
                        return message
                entries = await Streams(self.redis).read(
                    {keys.SCHEDULER: self.position}, count=64, block_ms=200
                )
                for entry in entries:
                    self.position = entry.entry_id
                    self.heard.append(entry.message)

    def heard_of(self, kind: type[messages.Message]) -> int:
        return sum(isinstance(message, kind) for message in self.heard)

    async def tell(self, message: messages.Message) -> None:
        await Streams(self.redis).send(keys.control(self.incarnation), message)

    async def admit(self, request_id: str, *, resume_step: int = 0, **changes: Any) -> int:
        await self.tell(
            messages.AdmitRequest(
                epoch=EPOCH,
                request_id=request_id,
                attempt=ATTEMPT,
                parameters=parameters(**changes),
                resume_step=resume_step,
            )
        )
        admitted = await self.hear(
            messages.RequestAdmitted, is_it=lambda one: one.incarnation == self.incarnation
        )
        return admitted.step_index

    async def denoise(self, step_index: int, *request_ids: str) -> messages.SlotDenoised:
        seq = await self.send_slot(step_index, *request_ids)
        return await self.hear(messages.SlotDenoised, is_it=lambda one: one.seq == seq)

    async def send_slot(self, step_index: int, *request_ids: str) -> int:
        self.seq += 1
        rows = tuple(
            messages.SlotRow(request_id=one, attempt=ATTEMPT, step_index=step_index)
            for one in request_ids
        )
        slot = messages.DenoiseSlot(epoch=EPOCH, seq=self.seq, kind="alone", threads=1, rows=rows)
        await Streams(self.redis).send(keys.work(self.incarnation), slot)
        return slot.seq

    async def latents(self, request_id: str) -> torch.Tensor:
        finished = await self.hear(
            messages.LatentsFinished, is_it=lambda one: one.request_id == request_id
        )
        handle = finished.handle
        data = await self.redis.hget(handle.inline_key, "data")  # type: ignore[misc]
        await self.tell(messages.ReleaseLatents(slot=handle.slot, generation=handle.generation))
        return unpack_tensor(data, handle.shape, handle.dtype)


@asynccontextmanager
async def working(
    redis: Redis, folder: Path, worker_id: str, **settings: Any
) -> AsyncIterator[tuple[UnetWorkerService, Desk, asyncio.Task[None]]]:
    """A worker that has registered, and what its scheduler needs to talk to it."""
    chosen = UnetWorkerSettings(
        model=folder, device="cpu", dtype="float32", threads=1, worker_id=worker_id, **settings
    )
    service = UnetWorkerService(redis, chosen)
    task = asyncio.create_task(service.run())
    desk = Desk(redis)
    desk.incarnation = (
        await desk.hear(
            messages.WorkerRegistered, is_it=lambda one: one.worker.worker_id == worker_id
        )
    ).worker.incarnation
    await desk.tell(messages.BeginEpoch(epoch=EPOCH))
    await desk.hear(messages.WorkerAnnounced)
    try:
        yield service, desk, task
    finally:
        service.stop()
        service.stop()
        await task


async def test_a_full_pool_holds_up_the_hand_over_and_nothing_else(
    redis: Redis, tiny_model_folder: Path
) -> None:
    async with working(redis, tiny_model_folder, "u0", pool_slots=1) as (_, desk, _task):
        for name in ("a", "b"):
            await desk.admit(name, num_inference_steps=1)
        await desk.admit("long", num_inference_steps=6)
        await desk.denoise(0, "a", "b", "long")
        first = await desk.hear(messages.LatentsFinished)
        # The other one's latents wait for the only slot; the loop goes on with other rows.
        for step in (1, 2, 3):
            report = await desk.denoise(step, "long")
            assert report.rows[0].has_run
        assert desk.heard_of(messages.LatentsFinished) == 0
        handle = first.handle
        await desk.tell(messages.ReleaseLatents(slot=handle.slot, generation=handle.generation))
        second = await desk.hear(messages.LatentsFinished)
        assert {first.request_id, second.request_id} == {"a", "b"}


async def test_a_worker_whose_gpu_is_lost_ends_instead_of_failing_requests(
    redis: Redis, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    async def until_it_is_lost() -> None:
        async with working(redis, tiny_model_folder, "u0") as (_, desk, task):
            await desk.admit("r")
            monkeypatch.setattr(Denoiser, "run", fail)
            # The device works, so it is the request's own fault.
            assert (await desk.denoise(0, "r")).failures
            await desk.admit("s")
            monkeypatch.setattr("services.unet_worker.service.finish_work", fail)
            answer = asyncio.create_task(desk.denoise(0, "s"))
            await asyncio.wait({task, answer}, return_when=asyncio.FIRST_COMPLETED)
            assert not answer.done()
            answer.cancel()

    with pytest.raises(ExceptionGroup) as ended:
        await until_it_is_lost()
    assert ended.group_contains(RuntimeError, match="CUDA error")


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
async def test_a_request_goes_on_at_another_worker_as_if_it_had_never_moved(
    redis: Redis, tiny_model_folder: Path, sampler: str
) -> None:
    request = {"num_inference_steps": 6, "sampler": sampler, "seed": 5}
    async with working(redis, tiny_model_folder, "u0") as (old, desk, old_task):
        await desk.admit("stays", **request)
        await desk.admit("moves", **request)
        for step in range(3):
            await desk.denoise(step, "stays", "moves")
        for step in range(3, 6):
            await desk.denoise(step, "stays")
        expected = await desk.latents("stays")
        old.stop()
        await desk.hear(messages.WorkerDraining)
        handed_back = await desk.hear(messages.RequestHandedBack)
        assert (handed_back.request_id, handed_back.step_index) == ("moves", 3)
        await desk.tell(messages.LeaveWhenDone(epoch=EPOCH))
        await asyncio.wait_for(old_task, 20)
        async with working(redis, tiny_model_folder, "u1") as (_, next_desk, _task):
            assert await next_desk.admit("moves", resume_step=3, **request) == 3
            for step in range(3, 6):
                await next_desk.denoise(step, "moves")
            found = await next_desk.latents("moves")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not await redis.keys("sd:resume:*")


async def test_what_is_not_left_any_more_begins_again(
    redis: Redis, tiny_model_folder: Path
) -> None:
    async with working(redis, tiny_model_folder, "u0") as (_, desk, _task):
        assert await desk.admit("gone", resume_step=3, num_inference_steps=6) == 0
        await redis.hset(keys.resume("odd", ATTEMPT), mapping={"step": 3, "state": b"?"})  # type: ignore[misc]
        assert await desk.admit("odd", resume_step=3, num_inference_steps=6) == 0


async def test_a_draining_worker_finishes_what_can_t_move_and_sees_its_latents_committed(
    redis: Redis, tiny_model_folder: Path
) -> None:
    async with working(redis, tiny_model_folder, "u0") as (service, desk, task):
        await desk.admit("stuck", num_inference_steps=4, sampler="UniPCMultistepScheduler")
        await desk.denoise(0, "stuck")
        service.stop()
        await desk.hear(messages.WorkerDraining)
        await desk.tell(messages.LeaveWhenDone(epoch=EPOCH))
        # What was on its way already comes straight back.
        late = messages.AdmitRequest(
            epoch=EPOCH, request_id="late", attempt=ATTEMPT, parameters=parameters()
        )
        await desk.tell(late)
        assert (await desk.hear(messages.RequestHandedBack)).step_index == 0
        for step in (1, 2, 3):
            await desk.denoise(step, "stuck")
        finished = await desk.hear(messages.LatentsFinished)
        assert not task.done()
        handle = finished.handle
        await desk.tell(messages.ReleaseLatents(slot=handle.slot, generation=handle.generation))
        await asyncio.wait_for(task, 20)
        await desk.hear(messages.WorkerLost)


async def test_draining_ends_in_time_whatever_is_left(
    redis: Redis, tiny_model_folder: Path
) -> None:
    async with working(redis, tiny_model_folder, "u0", drain_timeout_s=1.0) as (
        service,
        desk,
        task,
    ):
        await desk.admit("stuck", num_inference_steps=4, sampler="UniPCMultistepScheduler")
        await desk.denoise(0, "stuck")
        service.stop()
        await asyncio.wait_for(task, 20)


async def test_nobody_may_leave_before_everything_that_came_is_taken(redis: Redis) -> None:
    link = WorkerLink(redis, "w-1", WorkerSettings(drain_timeout_s=0.1), Watchdog())
    link.drain()
    link.control.append(messages.LeaveWhenDone(epoch=EPOCH))
    link.work.append(messages.BeginEpoch(epoch=EPOCH))
    await link._stop_drained_late()
    assert not link.may_leave
    link.control.clear()
    assert not link.may_leave
    link.work.clear()
    assert link.may_leave
