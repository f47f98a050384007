"""A worker whose work hangs shows no life, though its event loop runs, and asks to be ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from running_services import num_done, stack
from test_unet_worker_service import Desk as UnetDesk

from services.unet_worker.denoiser import Denoiser
from services.unet_worker.service import UnetWorkerService
from services.vae_worker import service as vae_service
from services.vae_worker.service import VaeWorkerService
from shared import keys, messages
from shared.probe import READINESS
from shared.settings import UnetWorkerSettings, VaeWorkerSettings
from shared.watchdog import Watchdog

CHOSEN: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "max_call_s": 6.0,
    "heartbeat_ttl_ms": 1_000,
}


class Hang:
    """Stands in for what hangs, until it is let go."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.ended: list[str] = []

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.is_over.wait(120)
        raise RuntimeError("was stuck")

    def watchdog(self) -> Watchdog:
        return Watchdog(self.ended.append)


@asynccontextmanager
async def hanging() -> AsyncIterator[Hang]:
    hang = Hang()
    try:
        yield hang
    finally:
        hang.is_over.set()


async def until_lost(redis: Redis, incarnation: str, hang: Hang) -> None:
    async with asyncio.timeout(120):
        while not hang.ended or await redis.exists(keys.worker(incarnation)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def registered(redis: Redis, worker_id: str) -> str:
    async with asyncio.timeout(120):
        while True:
            for name in await redis.smembers(keys.WORKERS):
                if name.startswith(f"{worker_id}-".encode()):
                    return str(name.decode())
            await asyncio.sleep(0.05)


async def end(task: asyncio.Task[None], service: Any) -> None:
    service.stop()
    service.stop()
    await asyncio.wait_for(task, 60)


async def test_a_unet_worker_whose_slot_hangs_is_lost(
    redis: Redis, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hanging() as hang:
        settings = UnetWorkerSettings(model=tiny_model_folder, worker_id="u", **CHOSEN)
        service = UnetWorkerService(redis, settings, hang.watchdog())
        task = asyncio.create_task(service.run())
        desk = UnetDesk(redis, incarnation=await registered(redis, "u"))
        await desk.admit("one", num_inference_steps=4)
        monkeypatch.setattr(Denoiser, "run", hang)
        denoising = asyncio.create_task(desk.denoise(0, "one"))
        await until_lost(redis, desk.incarnation, hang)
        assert "slot 1" in hang.ended[0]
        assert not READINESS.is_ready
        hang.is_over.set()
        await denoising
        await end(task, service)


@pytest.mark.parametrize("stuck", ["decode_chunks", "encode_image"])
async def test_a_vae_worker_whose_work_hangs_is_lost(
    redis: Redis, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, stuck: str
) -> None:
    async with hanging() as hang, stack(redis, tiny_model_folder) as running:
        settings = VaeWorkerSettings(model=tiny_model_folder, worker_id="v", **CHOSEN)
        service = VaeWorkerService(redis, settings, hang.watchdog())
        task = asyncio.create_task(service.run())
        incarnation = await registered(redis, "v")
        await running.unet("u")
        running.scheduler()
        if stuck == "decode_chunks":
            monkeypatch.setattr(VaeWorkerService, "_advance", hang)
        else:
            monkeypatch.setattr(vae_service, stuck, hang)
        await running.submit(1, num_steps=2)
        await until_lost(redis, incarnation, hang)
        monkeypatch.undo()
        await running.vae("w")  # a healthy one
        await running.until(lambda records: num_done(records) == 1)
        hang.is_over.set()
        service.stop()
        service.stop()
        async with asyncio.timeout(60):
            await asyncio.gather(task, return_exceptions=True)  # it may end by what was stuck


async def test_a_worker_drops_its_slots_whenever_an_epoch_begins(
    redis: Redis, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is the epoch that it knows: it has been given up, and others have its work."""
    async with hanging() as hang:
        settings = UnetWorkerSettings(
            model=tiny_model_folder, worker_id="u", **CHOSEN | {"max_call_s": 60.0}
        )
        service = UnetWorkerService(redis, settings)
        task = asyncio.create_task(service.run())
        desk = UnetDesk(redis, incarnation=await registered(redis, "u"))
        await desk.tell(messages.BeginEpoch(epoch=1))
        assert (await desk.hear(messages.WorkerAnnounced)).held == ()
        await desk.admit("one", num_inference_steps=4)
        run = Denoiser.run
        began = threading.Event()

        def slowly(*args: Any) -> Any:
            began.set()
            hang.is_over.wait(60)
            return run(*args)

        monkeypatch.setattr(Denoiser, "run", slowly)
        for step in (0, 1):
            await desk.send_slot(step, "one")
        await asyncio.to_thread(began.wait, 60)
        await desk.tell(messages.BeginEpoch(epoch=1))
        await asyncio.sleep(1.0)  # all of that has been read
        hang.is_over.set()
        announced = await desk.hear(messages.WorkerAnnounced)
        assert [(one.request_id, one.step_index) for one in announced.held] == [("one", 1)]
        denoised = await desk.denoise(1, "one")  # which the queued slot has not done
        assert denoised.rows[0].has_run
        await end(task, service)
