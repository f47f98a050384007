"""The VAE worker's shell: its start, messages in, decodes and measurements begun."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from functools import partial

import torch
from redis.asyncio import Redis

from services.vae_worker.compute_pool import ComputePool
from services.vae_worker.decodes import Decodes
from services.vae_worker.measure import measure_for, time_chunks
from services.vae_worker.model import Decoder, load_decoder
from shared.device import choose_device
from shared.device_lock import alone_on
from shared.logs import get_logger
from shared.messages import (
    BeginEpoch,
    CancelDecode,
    ChunksMeasured,
    DecodeLatents,
    GrantChunks,
    MeasureChunks,
    Message,
    WorkerAnnounced,
    WorkerInfo,
)
from shared.model_folder import check_model_folder, model_digest
from shared.settings import VaeWorkerSettings, available_threads
from shared.tasks import TaskGroup
from shared.watchdog import Patience, Watchdog
from shared.worker import ComputeThread, WorkerLink, find_place, keep_helpers_serial
from shared.worker_id import make_incarnation, make_worker_id

log = get_logger()

GRANT_POLL_S = 0.002
"""How often to look whether a slot has begun that chunks wait for."""

MAX_DECODES = 4
"""Side by side where the settings leave it open: each takes memory, and a decode of a large picture
is as fast on several threads."""


class VaeWorkerService:
    """One VAE worker process.

    Args:
        redis: The connection; the caller owns it.
        settings: As read at the start.
        watchdog: Ends this process where it hangs.
    """

    def __init__(
        self, redis: Redis, settings: VaeWorkerSettings, watchdog: Watchdog | None = None
    ) -> None:
        worker_id = make_worker_id(settings.worker_id, "vae")
        self._redis = redis
        self._settings = settings
        self._worker_id = worker_id
        self._num_threads = settings.threads or available_threads()
        self._watchdog = watchdog or Watchdog()
        self._link = WorkerLink(redis, make_incarnation(worker_id), settings, self._watchdog)
        self._measurements: deque[MeasureChunks] = deque()
        self._compute: ComputePool
        self._patience: Patience
        self._decoder: Decoder
        self._decodes: Decodes

    def stop(self) -> None:
        """Finish the decodes that are here, end; called again: end after the current chunks."""
        self._link.drain()

    async def run(self) -> None:
        """Load, measure, register, decode until stopped."""
        keep_helpers_serial()
        max_decodes = choose_max_decodes(self._settings, self._num_threads)
        self._compute = ComputePool(max_decodes, self._num_threads, self._watchdog)
        info = await self._start(max_decodes)
        log.info(
            "ready",
            decode_ms=round(info.decode_ms, 1),
            chunks=info.num_chunks,
            side_by_side=max_decodes,
        )
        async with TaskGroup() as group:
            group.create_task(self._link.run(info))
            group.create_task(self._drop_dead_pools())
            while not self._link.is_stopping:
                self._take_messages()
                self._begin_work(group)
                if self._link.may_leave and self._decodes.is_idle:
                    self._link.stop()
                elif self._decodes.awaits_slot:
                    await asyncio.sleep(GRANT_POLL_S)
                else:
                    await self._link.news()
            self._decodes.queue.drop_all()
        self._compute.close()
        self._watchdog.close()

    # --- start ----------------------------------------------------------------------------------

    async def _start(self, max_decodes: int) -> WorkerInfo:
        """Load the VAE and measure a decode of the default size.

        Raises:
            ConfigurationError: The folder holds no VAE, or a profile can't be read.
        """
        durations_s = await self._compute.run_alone(
            "loading and measuring",
            partial(self._load_and_measure, max_decodes),
            within_s=self._settings.max_start_s,
        )
        decoder = self._decoder
        place = find_place(
            decoder.device,
            device_group=self._settings.device_group,
            shares_host=self._settings.transport == "auto",
        )
        return WorkerInfo(
            worker_id=self._worker_id,
            incarnation=self._link.incarnation,
            kind="vae",
            device_group=place.device_group,
            host=place.host,
            device=place.device,
            runs_side_by_side=place.runs_side_by_side,
            dtype=str(decoder.dtype).removeprefix("torch."),
            threads=self._num_threads,
            max_requests=0,
            max_decodes=max_decodes,
            model_id=decoder.name,
            model_digest=model_digest(self._settings.model),
            decode_ms=statistics.median(durations_s) * 1000,
            num_chunks=self._decodes.runner.plan(*decoder.default_size).num_chunks,
        )

    def _load_and_measure(self, max_decodes: int) -> list[float]:
        """Return the seconds of some decodes; runs in a compute thread."""
        with alone_on(self._settings.device_group or self._settings.device):
            self._load()
            plan = self._decodes.runner.plan(*self._decoder.default_size)
            durations_s = [sum(time_chunks(self._decoder, plan)) for _ in range(4)]
            self._patience.learn(min(durations_s))
            # Kernels are compiled for each number of threads.
            for num_threads in {self._num_threads // max_decodes, self._num_threads}:
                torch.set_num_threads(num_threads)
                self._warm_up()
            torch.set_num_threads(self._num_threads)
        return durations_s[1:]

    def _load(self) -> None:
        settings = self._settings
        check_model_folder(settings.model)
        decoder = load_decoder(settings.model, device=settings.device, dtype=settings.dtype)
        self._decoder = decoder
        height, width = decoder.default_size
        pixels = height * width * decoder.scale_factor**2
        self._patience = Patience(settings.max_call_s, pixels)
        self._decodes = Decodes(
            redis=self._redis,
            settings=settings,
            link=self._link,
            compute=self._compute,
            decoder=decoder,
            patience=self._patience,
            watchdog=self._watchdog,
        )

    def _warm_up(self) -> None:
        """Decode once at each size that is to be ready; runs in a compute thread."""
        factor = self._decoder.scale_factor
        sizes = [(h // factor, w // factor) for h, w in self._settings.sizes_to_warm_up]
        for size in (self._decoder.default_size, *sizes):
            time_chunks(self._decoder, self._decodes.runner.plan(*size))

    # --- messages -------------------------------------------------------------------------------

    def _take_messages(self) -> None:
        for lane in (self._link.control, self._link.work):
            while lane:
                self._take(lane.popleft())

    def _take(self, message: Message) -> None:
        queue = self._decodes.queue
        match message:
            case BeginEpoch(epoch=epoch) if queue.is_current(epoch):
                self._measurements.clear()
                queue.begin_epoch(epoch)
                self._link.post(WorkerAnnounced(incarnation=self._link.incarnation, epoch=epoch))
            case DecodeLatents() if queue.is_current(message.epoch):
                queue.add(message)
            case GrantChunks() if queue.is_current(message.epoch):
                queue.grant(message, time.monotonic())
            case MeasureChunks() if queue.is_current(message.epoch):
                self._measurements.append(message)
            case CancelDecode():
                queue.cancel(message)
            case _:
                log.debug("ignored", message=type(message).__name__)

    # --- work -----------------------------------------------------------------------------------

    def _begin_work(self, group: TaskGroup) -> None:
        """Begin what may run now; a measurement is alone, and goes first."""
        if not self._measurements:
            self._decodes.begin(group)
        elif self._compute.is_idle:
            command = self._measurements.popleft()
            thread = self._compute.lend(command.threads, is_alone=True)
            group.create_task(self._measure(command, thread))

    async def _measure(self, command: MeasureChunks, thread: ComputeThread) -> None:
        """Time decodes of dummy latents; no request is touched."""
        factor = self._decoder.scale_factor
        window_s = command.window_ms / 1000

        def measure() -> tuple[float, ...]:
            plan = self._decodes.runner.plan(command.height // factor, command.width // factor)
            return measure_for(self._decoder, plan, window_s)

        patience_s = self._patience.within_s(pixels=command.height * command.width)
        chunk_ms: tuple[float, ...] = ()
        try:
            chunk_ms = await thread.run(
                "a measurement of decodes",
                measure,
                within_s=window_s + 2 * patience_s,
                threads=command.threads,
            )
        except (RuntimeError, MemoryError) as error:
            log.warning("not measured", error=repr(error))
        finally:
            self._compute.take_back(thread)
            self._link.nudge()
        self._link.post(
            ChunksMeasured(
                incarnation=self._link.incarnation,
                epoch=command.epoch,
                number=command.number,
                chunk_ms=chunk_ms,
            )
        )

    async def _drop_dead_pools(self) -> None:
        while not self._link.is_stopping:
            self._decodes.drop_dead_pools()
            await asyncio.sleep(1.0)


def choose_max_decodes(settings: VaeWorkerSettings, num_threads: int) -> int:
    """Return how many decodes to run side by side; on a CPU no more than there are threads.

    Raises:
        ConfigurationError: The device is not there.
    """
    if choose_device(settings.device).type != "cpu":
        return settings.max_decodes or 1
    return min(settings.max_decodes or MAX_DECODES, num_threads)
