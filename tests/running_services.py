"""A scheduler and workers in the test's own process, on a real server, and requests put to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from denoising import parameters
from redis.asyncio import Redis

from services.scheduler.service import SchedulerService
from services.unet_worker.service import UnetWorkerService
from services.vae_worker.service import VaeWorkerService
from shared.messages import GenerateImage
from shared.service_main import Service
from shared.settings import SchedulerSettings, UnetWorkerSettings, VaeWorkerSettings
from shared.store.records import JobRecord, Records, RequestRecord


@dataclass
class Running:
    service: Service
    task: asyncio.Task[None]

    async def leave(self) -> None:
        """Told to stop, as by SIGTERM; it must end by itself."""
        self.service.stop()
        async with asyncio.timeout(60):
            await self.task

    async def insist(self) -> None:
        self.service.stop()
        self.service.stop()
        await self.task


@dataclass
class Stack:
    """A scheduler and workers, and the requests that were put to them."""

    redis: Redis
    folder: Path
    services: AsyncExitStack
    request_ids: list[str] = field(default_factory=list)

    def _start(self, service: Service) -> Running:
        running = Running(service, asyncio.create_task(service.run()))
        self.services.push_async_callback(running.insist)
        return running

    def scheduler(self, **settings: Any) -> Running:
        return self._start(
            SchedulerService(self.redis, SchedulerSettings(recovery_s=1.0, **settings))
        )

    async def unet(self, worker_id: str) -> Running:
        settings = UnetWorkerSettings(
            model=self.folder, device="cpu", dtype="float32", threads=1, worker_id=worker_id
        )
        return await self._registered(worker_id, UnetWorkerService(self.redis, settings))

    async def vae(self, worker_id: str) -> Running:
        settings = VaeWorkerSettings(
            model=self.folder, device="cpu", dtype="float32", threads=1, worker_id=worker_id
        )
        return await self._registered(worker_id, VaeWorkerService(self.redis, settings))

    async def _registered(self, worker_id: str, service: Service) -> Running:
        """Once it is: two models can't be loaded at a time in one process."""
        running = self._start(service)
        async with asyncio.timeout(120):
            while not any([key async for key in self.redis.scan_iter(f"sd:worker:{worker_id}-*")]):
                assert not running.task.done(), running.task
                await asyncio.sleep(0.05)
        return running

    async def submit(self, num_pictures: int, *, num_steps: int) -> None:
        requests = [
            GenerateImage(
                request_id=f"r{number}",
                job_id="job",
                owner="",
                priority=0,
                deadline_ms=0,
                submitted_at=0.0,
                parameters=parameters(
                    seed=number, num_inference_steps=num_steps, model=self.folder.name
                ),
            )
            for number in range(num_pictures)
        ]
        self.request_ids = [request.request_id for request in requests]
        job = JobRecord(job_id="job", request_ids=tuple(self.request_ids))
        await Records(self.redis).submit(job, requests, max_open=num_pictures)

    async def records(self) -> list[RequestRecord]:
        found = [await Records(self.redis).read(request_id) for request_id in self.request_ids]
        return [record for record in found if record]

    async def until(self, condition: Callable[[list[RequestRecord]], bool]) -> None:
        async with asyncio.timeout(120):
            while not condition(await self.records()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@asynccontextmanager
async def stack(redis: Redis, folder: Path) -> AsyncIterator[Stack]:
    async with AsyncExitStack() as services:
        yield Stack(redis, folder, services)


def num_done(records: list[RequestRecord]) -> int:
    return sum(record.state == "done" for record in records)
