"""The VAE worker's shell: messages in, chunks in compute threads, commits and reports out."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from functools import partial

import torch
from redis.asyncio import Redis

from services.vae_worker.chunk_runner import ChunkRunner
from services.vae_worker.committer import Committer
from services.vae_worker.compute_pool import ComputePool
from services.vae_worker.decode_queue import Decode, DecodeQueue
from services.vae_worker.granularity import choose_granularity
from services.vae_worker.latents_source import LatentsSource
from services.vae_worker.measure import measure_for, time_chunks
from services.vae_worker.model import Decoder, load_decoder
from services.vae_worker.unet_beside import UnetBeside
from shared import metrics
from shared.cuda_ipc import gpu_ipc
from shared.device import choose_device, finish_work
from shared.errors import HandleLostError, SynerDiffError
from shared.logs import get_logger
from shared.messages import (
    BeginEpoch,
    CancelDecode,
    ChunksDecoded,
    ChunksMeasured,
    DecodeLatents,
    GrantChunks,
    HandleLost,
    MeasureChunks,
    Message,
    RequestFailed,
    WorkerInfo,
)
from shared.records import Records
from shared.settings import VaeWorkerSettings, available_threads
from shared.tensor_pool import TensorReader
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
    """

    def __init__(self, redis: Redis, settings: VaeWorkerSettings) -> None:
        worker_id = make_worker_id(settings.worker_id, "vae")
        self._redis = redis
        self._settings = settings
        self._worker_id = worker_id
        self._num_threads = settings.threads or available_threads()
        self._link = WorkerLink(
            redis,
            make_incarnation(worker_id),
            heartbeat_ttl_ms=settings.heartbeat_ttl_ms,
            drain_timeout_s=settings.drain_timeout_s,
        )
        self._committer = Committer(Records(redis, settings.retention), self._link.incarnation)
        self._queue = DecodeQueue()
        self._measurements: deque[MeasureChunks] = deque()
        self._num_committing = 0
        self._max_decodes: int
        self._compute: ComputePool
        self._reader: TensorReader
        self._source: LatentsSource
        self._decoder: Decoder
        self._beside: UnetBeside
        self._runner: ChunkRunner

    def stop(self) -> None:
        """Finish the decodes that are here, end; called again: end after the current chunks."""
        self._link.drain()

    async def run(self) -> None:
        """Load, measure, register, decode until stopped."""
        keep_helpers_serial()
        self._max_decodes = choose_max_decodes(self._settings, self._num_threads)
        self._compute = ComputePool(self._max_decodes, self._num_threads)
        info = await self._start()
        log.info("ready", decode_ms=round(info.decode_ms, 1), chunks=info.num_chunks)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.run(info))
            group.create_task(self._drop_dead_pools())
            while not self._link.is_stopping:
                self._take_messages()
                self._begin_work(group)
                has_work = len(self._queue) or self._num_committing or not self._compute.is_idle
                if self._link.may_leave and not has_work:
                    self._link.stop()
                elif self._compute.has_room and self._queue.waiting():
                    await asyncio.sleep(GRANT_POLL_S)
                else:
                    await self._link.news()
            self._queue.drop_all()
        self._compute.close()

    # --- start ----------------------------------------------------------------------------------

    async def _start(self) -> WorkerInfo:
        """Load the VAE and measure a decode of the default size.

        Raises:
            ConfigurationError: The folder holds no VAE, or a profile can't be read.
        """
        durations_s = await self._compute.run_alone(self._load_and_measure)
        if self._max_decodes > 1:
            # Kernels are compiled for each number of threads.
            few = self._num_threads // self._max_decodes
            await self._compute.run_alone(self._warm_up, threads=few)
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
            max_decodes=self._max_decodes,
            model_id=decoder.name,
            decode_ms=statistics.median(durations_s) * 1000,
            num_chunks=self._runner.plan(*decoder.default_size).num_chunks,
        )

    def _load_and_measure(self) -> list[float]:
        """Return the seconds of some decodes, the first left out; runs in a compute thread."""
        settings = self._settings
        self._decoder = load_decoder(settings.model, device=settings.device, dtype=settings.dtype)
        self._reader = TensorReader(ipc=gpu_ipc(self._decoder.device))
        self._source = LatentsSource(self._redis, self._reader)
        self._beside = UnetBeside(self._reader)
        granularity = choose_granularity(settings, self._decoder)
        self._runner = ChunkRunner(self._decoder, granularity, self._beside)
        plan = self._runner.plan(*self._decoder.default_size)
        durations_s = [sum(time_chunks(self._decoder, plan)) for _ in range(4)]
        self._warm_up()
        return durations_s[1:]

    def _warm_up(self) -> None:
        """Decode once at each size that is to be ready; runs in a compute thread."""
        factor = self._decoder.latents_format.vae_scale_factor
        sizes = [(h // factor, w // factor) for h, w in self._settings.sizes_to_warm_up]
        for size in (self._decoder.default_size, *sizes):
            time_chunks(self._decoder, self._runner.plan(*size))

    # --- messages -------------------------------------------------------------------------------

    def _take_messages(self) -> None:
        for lane in (self._link.control, self._link.work):
            while lane:
                self._take(lane.popleft())

    def _take(self, message: Message) -> None:
        match message:
            case BeginEpoch(epoch=epoch):
                self._measurements.clear()
                self._queue.begin_epoch(epoch)
            case DecodeLatents() if self._queue.is_current(message.epoch):
                self._queue.add(message)
            case GrantChunks() if self._queue.is_current(message.epoch):
                self._queue.grant(message, time.monotonic())
            case MeasureChunks() if self._queue.is_current(message.epoch):
                self._measurements.append(message)
            case CancelDecode():
                self._queue.cancel(message)
            case _:
                log.debug("ignored", message=type(message).__name__)

    # --- work -----------------------------------------------------------------------------------

    def _begin_work(self, group: asyncio.TaskGroup) -> None:
        """Begin what may run now; a measurement is alone, and goes first."""
        if self._measurements:
            if self._compute.is_idle:
                command = self._measurements.popleft()
                thread = self._compute.lend(command.threads, is_alone=True)
                group.create_task(self._measure(command, thread))
            return
        runnable = self._queue.runnable(time.monotonic(), self._beside.has_begun)
        for index, decode in enumerate(runnable):
            if not self._compute.has_room:
                return
            granted = decode.grants[0].command.threads or self._num_threads
            threads = self._compute.threads_for(granted, len(runnable) - index)
            self._queue.begin_run(decode)
            thread = self._compute.lend(threads)
            group.create_task(self._run_grant(decode, thread, threads, share=threads / granted))

    async def _run_grant(
        self, decode: Decode, thread: ComputeThread, threads: int, *, share: float
    ) -> None:
        """Run the oldest grant of a decode; after the last chunk of all, encode and commit."""
        image = None
        try:
            image = await self._compute_grant(decode, thread, threads, share=share)
        finally:
            self._queue.end_run(decode)
            self._compute.take_back(thread)
            self._link.nudge()
        if image is None:
            return
        self._queue.drop(decode)
        metrics.DECODE_SECONDS.observe(decode.device_s)
        self._num_committing += 1
        try:
            await self._commit(decode, image)
        finally:
            self._num_committing -= 1
            self._link.nudge()

    async def _compute_grant(
        self, decode: Decode, thread: ComputeThread, threads: int, *, share: float
    ) -> torch.Tensor | None:
        """Return the image if the decode is over; report how far it came, or why it can't go on."""
        command = decode.command
        try:
            if decode.chunks is None:
                latents, decode.transport = await self._source.fetch(command)
                self._runner.begin(decode, latents)
            image = await thread.run(
                partial(self._runner.run, decode, share=share), threads=threads
            )
        except HandleLostError as error:
            self._lose(decode, error)
            return None
        except (RuntimeError, MemoryError, SynerDiffError) as error:
            # Raises where a GPU's context is lost. Then the worker ends, and another process can
            # do what this one would only fail.
            await thread.run(partial(finish_work, self._decoder.device))
            if not decode.is_dropped:
                self._fail(decode, error)
            return None
        if decode.is_dropped:
            return None
        grant = decode.grants.popleft()
        self._link.post(
            ChunksDecoded(
                incarnation=self._link.incarnation,
                request_id=command.request_id,
                attempt=command.attempt,
                chunks_done=decode.num_done,
                duration_ms=grant.device_s * 1000,
                num_chunks=decode.num_chunks,
            )
        )
        return image

    async def _commit(self, decode: Decode, image: torch.Tensor) -> None:
        command = decode.command
        try:
            is_committed = await self._committer.commit(decode, image)
        except SynerDiffError as error:
            self._fail(decode, error)
            return
        if not is_committed:
            log.info("commit lost to a final state or newer attempt", request=command.request_id)

    async def _measure(self, command: MeasureChunks, thread: ComputeThread) -> None:
        """Time decodes of dummy latents; no request is touched."""
        factor = self._decoder.latents_format.vae_scale_factor

        def measure() -> tuple[float, ...]:
            plan = self._runner.plan(command.height // factor, command.width // factor)
            return measure_for(self._decoder, plan, command.window_ms / 1000)

        chunk_ms: tuple[float, ...] = ()
        try:
            chunk_ms = await thread.run(measure, threads=command.threads)
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

    def _lose(self, decode: Decode, error: HandleLostError) -> None:
        """Say that a decode's latents are nowhere."""
        if decode.is_dropped:
            return
        command = decode.command
        self._queue.drop(decode)
        metrics.HANDLES_LOST.inc()
        log.warning("handle lost", request_id=command.request_id, error=str(error))
        self._link.post(
            HandleLost(
                incarnation=self._link.incarnation,
                request_id=command.request_id,
                attempt=command.attempt,
                reason=str(error),
            )
        )

    def _fail(self, decode: Decode, error: Exception) -> None:
        """Say that a decode can't be done."""
        command = decode.command
        self._queue.drop(decode)
        log.warning("decode failed", request_id=command.request_id, error=repr(error))
        self._link.post(
            RequestFailed(
                incarnation=self._link.incarnation,
                request_id=command.request_id,
                attempt=command.attempt,
                code=error.code if isinstance(error, SynerDiffError) else "decode_failed",
                reason=f"The picture could not be decoded: {error}",
            )
        )

    async def _drop_dead_pools(self) -> None:
        while not self._link.is_stopping:
            self._reader.drop_dead()
            await asyncio.sleep(1.0)


def choose_max_decodes(settings: VaeWorkerSettings, num_threads: int) -> int:
    """Return how many decodes to run side by side; never more than there are CPU threads.

    Raises:
        ConfigurationError: The device is not there.
    """
    if choose_device(settings.device).type != "cpu":
        return settings.max_decodes or 1
    return min(settings.max_decodes or MAX_DECODES, num_threads)
