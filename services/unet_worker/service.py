"""The UNet worker's shell: admits requests, runs slots, hands finished latents over."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from redis.asyncio import Redis

from services.unet_worker.denoiser import Admission, Denoiser, SlotResult
from services.unet_worker.giving_way import GivingWay
from services.unet_worker.hand_over import HandOver
from services.unet_worker.isolation import run_isolated
from services.unet_worker.model import DiffusionModel, load_model
from services.unet_worker.prepare import prepare_unet
from services.unet_worker.resume import find_state, leave_state
from services.unet_worker.samplers import DEFAULT_SAMPLER
from shared import keys, metrics
from shared.cuda_ipc import gpu_ipc
from shared.device import finish_work
from shared.device_lock import alone_on
from shared.errors import ProtocolError, SynerDiffError
from shared.logs import get_logger
from shared.messages import (
    NO_ROOM,
    AdmitRequest,
    BeginEpoch,
    DenoiseSlot,
    HeldRequest,
    MeasureSlot,
    Message,
    ModelInfo,
    ReleaseLatents,
    ReleaseRequest,
    RequestAdmitted,
    RequestFailed,
    RequestHandedBack,
    SlotDenoised,
    SlotMeasured,
    WorkerAnnounced,
    WorkerInfo,
)
from shared.model_folder import check_model_folder, model_digest
from shared.settings import UnetWorkerSettings, available_threads
from shared.tasks import TaskGroup
from shared.tensor_pool import TensorPool
from shared.watchdog import Patience, Watchdog
from shared.worker import ComputeThread, WorkerLink, find_place, keep_helpers_serial, run_beside
from shared.worker_id import make_incarnation, make_worker_id

PROFILE_ROWS = (1, 2, 4, 8, 16, 24)
"""Slot sizes measured at the start, up to the first without gain; the knee is among them."""

T = TypeVar("T")

log = get_logger()


class UnetWorkerService:
    """One UNet worker process.

    Args:
        redis: The connection; the caller owns it.
        settings: As read at the start.
        watchdog: Ends this process where it hangs.
    """

    def __init__(
        self, redis: Redis, settings: UnetWorkerSettings, watchdog: Watchdog | None = None
    ) -> None:
        worker_id = make_worker_id(settings.worker_id, "unet")
        self._redis = redis
        self._settings = settings
        self._worker_id = worker_id
        self._threads = settings.threads or available_threads()
        self._watchdog = watchdog or Watchdog()
        self._link = WorkerLink(redis, make_incarnation(worker_id), settings, self._watchdog)
        self._compute = ComputeThread(self._threads, self._watchdog)
        self._patience: Patience
        self._device: torch.device
        self._denoiser: Denoiser
        self._pool: TensorPool | None = None
        self._slots: deque[DenoiseSlot] = deque()
        self._hand_over: HandOver
        self._giving_way: GivingWay
        self._epoch = 0

    def stop(self) -> None:
        """Hand back what is held, see it decoded, end; called again: end after this slot."""
        self._link.drain()

    async def run(self) -> None:
        """Load, measure, register, denoise until stopped."""
        keep_helpers_serial()
        info = await self._compute.run(
            "loading and measuring", self._start_alone, within_s=self._settings.max_start_s
        )
        log.info("ready", step_ms={rows: round(ms, 1) for rows, ms in info.step_ms.items()})
        try:
            async with TaskGroup() as group:
                group.create_task(self._link.run(info))
                group.create_task(self._hand_over.expire_until_stopped())
                while not self._link.is_stopping:
                    await self._link.news()
                    await self._take_messages(group)
                    while self._slots and not self._link.is_stopping:
                        await self._run_slot(self._slots.popleft(), group)
                        await self._take_messages(group)
                    if self._link.may_leave and not self._holds_anything():
                        self._link.stop()
        finally:
            self._compute.close()
            self._watchdog.close()
            if self._pool:
                self._pool.close()

    # --- start ----------------------------------------------------------------------------------

    def _start_alone(self) -> WorkerInfo:
        with alone_on(self._settings.device_group or self._settings.device):
            return self._start()

    def _start(self) -> WorkerInfo:
        """Load the model, warm it up and measure slots; runs in the compute thread."""
        settings = self._settings
        check_model_folder(settings.model)
        model = load_model(settings.model, device=settings.device, dtype=settings.dtype)
        self._device = model.device
        self._denoiser = Denoiser(
            model, max_requests=settings.max_requests, max_side=settings.max_side
        )
        model.forward.splits_rows = settings.split_rows
        is_recorded = prepare_unet(model, settings.sizes_to_warm_up)
        log.info("loaded", device=str(model.device), is_recorded=is_recorded)
        step_ms = self._denoiser.measure(PROFILE_ROWS)
        facts = model.facts
        self._patience = Patience(settings.max_call_s, facts.default_height * facts.default_width)
        for rows, ms in step_ms.items():
            self._patience.learn(ms / 1000, rows=rows)
        self._denoiser.warm_up(settings.sizes_to_warm_up, tuple(step_ms))
        if settings.transport == "auto":
            self._pool = TensorPool(
                self._link.incarnation,
                num_slots=settings.pool_slots,
                slot_bytes=settings.pool_slot_kb << 10,
                timeout_s=settings.latents_ttl_s,
                ipc=gpu_ipc(model.device),
            )
        self._hand_over = HandOver(self._redis, self._link, settings, self._pool, self._watchdog)
        self._giving_way = GivingWay(self._has_chunks_beside)
        place = find_place(
            model.device,
            device_group=settings.device_group,
            shares_host=settings.transport == "auto",
        )
        info = self._describe(settings.model.resolve().name, model)
        return WorkerInfo(
            worker_id=self._worker_id,
            incarnation=self._link.incarnation,
            kind="unet",
            device_group=place.device_group,
            host=place.host,
            device=place.device,
            runs_side_by_side=place.runs_side_by_side,
            dtype=str(model.dtype).removeprefix("torch."),
            threads=self._threads,
            max_requests=settings.max_requests,
            model_id=info.model_id,
            model_digest=model_digest(settings.model),
            model=info,
            step_ms=step_ms,
            pool=self._pool.name if self._pool else "",
        )

    def _has_chunks_beside(self) -> bool:
        return bool(self._pool and self._pool.has_chunks_beside(time.monotonic_ns()))

    def _describe(self, name: str, model: DiffusionModel) -> ModelInfo:
        facts, samplers = model.facts, self._denoiser.samplers
        return ModelInfo(
            model_id=name,
            latent_channels=facts.latent_channels,
            vae_scale_factor=facts.vae_scale_factor,
            default_height=facts.default_height,
            default_width=facts.default_width,
            side_multiple=facts.side_multiple,
            max_side=self._settings.max_side,
            max_prompt_tokens=facts.max_tokens - 2,
            prediction_type=facts.prediction_type,
            samplers=samplers.names,
            default_sampler=DEFAULT_SAMPLER,
            max_steps_by_sampler=samplers.max_steps,
        )

    # --- messages -------------------------------------------------------------------------------

    async def _take_messages(self, group: TaskGroup) -> None:
        """Control first: admissions and releases apply before the next slot."""
        while self._link.control:
            await self._take(self._link.control.popleft(), group)
        while self._link.work:
            message = self._link.work.popleft()
            if isinstance(message, DenoiseSlot) and message.epoch >= self._epoch:
                self._slots.append(message)
        if self._link.is_draining:
            await self._hand_back()

    async def _take(self, message: Message, group: TaskGroup) -> None:
        match message:
            case AdmitRequest() if message.epoch >= self._epoch:
                await self._admit(message)
            case MeasureSlot() if message.epoch >= self._epoch:
                await self._measure(message)
            case ReleaseRequest(request_id=request_id, attempt=attempt):
                self._denoiser.release(request_id, attempt)
                self._hand_over.forget(request_id, attempt)
            case ReleaseLatents():
                self._hand_over.release(message, group)
            case BeginEpoch(epoch=epoch) if epoch >= self._epoch:
                # No slot comes before the answer to it, so all that are here are older.
                self._epoch = epoch
                self._slots.clear()
                self._link.work.clear()
                self._announce()
            case _:
                log.debug("ignored", message=type(message).__name__)

    def _announce(self) -> None:
        """Say what is held: unfinished, finished and on its way to the pool, and in the pool."""
        leaving = [
            HeldRequest(
                request_id=finished.request_id,
                attempt=finished.attempt,
                step_index=0,
                num_forwards=0,
                is_guided=True,
                num_skipped=len(finished.skipped_steps),
                warnings=finished.warnings,
            )
            for finished in self._hand_over.leaving
        ]
        self._link.post(
            WorkerAnnounced(
                incarnation=self._link.incarnation,
                epoch=self._epoch,
                held=(*self._denoiser.held(), *leaving),
                finished=self._hand_over.handed_over,
            )
        )

    async def _admit(self, command: AdmitRequest) -> None:
        if self._link.is_draining:
            self._post_handed_back(command.request_id, command.attempt, command.resume_step)
            return
        start = time.perf_counter()
        try:
            admission, step_index = await self._take_in(command)
        except (RuntimeError, MemoryError, SynerDiffError) as error:
            await self._check_device()
            log.warning("not admitted", request_id=command.request_id, error=repr(error))
            self._link.post(
                RequestFailed(
                    incarnation=self._link.incarnation,
                    request_id=command.request_id,
                    attempt=command.attempt,
                    code=error.code if isinstance(error, SynerDiffError) else "admission_failed",
                    reason=str(error),
                )
            )
            return
        metrics.ENCODE_SECONDS.observe(time.perf_counter() - start)
        self._link.post(
            RequestAdmitted(
                incarnation=self._link.incarnation,
                request_id=command.request_id,
                attempt=command.attempt,
                num_forwards=admission.num_forwards,
                is_guided=admission.is_guided,
                warnings=admission.warnings,
                step_index=step_index,
                num_skipped=admission.num_skipped,
            )
        )

    async def _take_in(self, command: AdmitRequest) -> tuple[Admission, int]:
        """Hold a request, from where a drained worker has left it if that can be; and its step."""
        place = (command.request_id, command.attempt)
        if command.resume_step:
            try:
                state = await find_state(self._redis, *place)
                if state:
                    admission = await self._call(
                        "an admission", partial(self._denoiser.import_state, state)
                    )
                    await self._redis.delete(keys.resume(*place))
                    metrics.RESUMED.inc()
                    return admission, state.step_index
                log.warning("nothing is left to resume", request_id=command.request_id)
            except ProtocolError as error:
                log.warning("not resumed", request_id=command.request_id, error=str(error))
        admit = partial(self._denoiser.admit, *place, command.parameters)
        return await self._call("an admission", admit), 0

    # --- leaving --------------------------------------------------------------------------------

    async def _hand_back(self) -> None:
        """Give up every request that another worker can go on with; the others are finished here.

        Its state is in Redis before the scheduler hears of it.
        """
        for held in self._denoiser.held():
            place = (held.request_id, held.attempt)
            if held.step_index:
                export = partial(self._denoiser.export_state, *place)
                state = await self._call("a hand-over", export)
                if state is None:
                    continue
                await leave_state(self._redis, state, ttl_s=self._settings.latents_ttl_s)
            self._denoiser.release(*place)
            self._post_handed_back(*place, held.step_index)

    def _post_handed_back(self, request_id: str, attempt: str, step_index: int) -> None:
        self._link.post(
            RequestHandedBack(
                incarnation=self._link.incarnation,
                request_id=request_id,
                attempt=attempt,
                step_index=step_index,
            )
        )

    def _holds_anything(self) -> bool:
        """Whether somebody still needs this process: unfinished requests, uncommitted handles."""
        return bool(self._denoiser.held()) or not self._hand_over.is_over

    # --- slots ----------------------------------------------------------------------------------

    async def _run_slot(self, slot: DenoiseSlot, group: TaskGroup) -> None:
        if self._pool:
            self._pool.set_running_seq(slot.seq)
        pixels = self._denoiser.pixels_of(slot.rows)
        run = partial(
            self._giving_way.run,
            partial(run_isolated, self._denoiser.run, slot.rows),
            threads=slot.threads,
            shape=slot.shape if slot.threads else NO_ROOM,
        )
        num_rows = 2 * len(slot.rows)  # at most
        running = asyncio.ensure_future(
            self._compute.run_timed(
                f"slot {slot.seq} of {len(slot.rows)} requests",
                run,
                within_s=self._patience.within_s(rows=num_rows, pixels=pixels),
                threads=slot.threads,
            )
        )
        if self._denoiser.draws_noise:
            await run_beside(
                self._watchdog,
                "noise for coming steps",
                self._denoiser.draw_ahead,
                within_s=self._patience.within_s(),
            )
        timed = await running
        result, duration = timed.result, timed.duration_s
        if result.num_unet_rows:
            self._patience.learn(duration, rows=result.num_unet_rows, pixels=pixels)
        if self._pool:
            # This slot is over: what is bound to the gap behind it may begin.
            self._pool.set_running_seq(slot.seq + 1)
        if result.failures:
            await self._check_device()
        for failure in result.failures:
            log.warning("failed in a slot", request_id=failure.request_id, reason=failure.reason)
            self._denoiser.release(failure.request_id, failure.attempt)
        self._observe(result, duration)
        self._link.post(
            SlotDenoised(
                incarnation=self._link.incarnation,
                epoch=slot.epoch,
                seq=slot.seq,
                duration_ms=duration * 1000,
                rows=result.rows,
                failures=result.failures,
            )
        )
        self._hand_over.add(result.finished, group)

    async def _check_device(self) -> None:
        """After a failure: return if the device works.

        Raises:
            RuntimeError: A GPU's context is lost. The worker ends by it, and another process can do
                what this one would only fail.
        """
        await self._call("a look at the device", partial(finish_work, self._device))

    async def _call(self, what: str, call: Callable[[], T]) -> T:
        """A call that is no forward."""
        return await self._compute.run(what, call, within_s=self._patience.within_s())

    def _observe(self, result: SlotResult, duration_s: float) -> None:
        metrics.STEP_SECONDS.observe(duration_s)
        metrics.SLOT_ROWS.observe(result.num_unet_rows)
        for row in result.rows:
            if row.has_run:
                metrics.FORWARDS.labels(guidance="skipped" if row.was_skipped else "full").inc()

    async def _measure(self, command: MeasureSlot) -> None:
        """Time dummy rows; no request is touched."""
        measure = partial(
            self._denoiser.measure_for,
            command.window_ms / 1000,
            rows=command.rows,
            size=(command.height, command.width),
        )
        try:
            pixels = command.height * command.width
            patience_s = self._patience.within_s(rows=command.rows, pixels=pixels)
            step_ms = await self._compute.run(
                f"a measurement of {command.rows} rows",
                measure,
                within_s=command.window_ms / 1000 + 2 * patience_s,
                threads=command.threads,
            )
        except (RuntimeError, MemoryError) as error:
            log.warning("not measured", rows=command.rows, error=repr(error))
            step_ms = 0.0
        self._link.post(
            SlotMeasured(
                incarnation=self._link.incarnation,
                epoch=command.epoch,
                number=command.number,
                step_ms=step_ms,
            )
        )
