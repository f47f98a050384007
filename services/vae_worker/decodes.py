"""Serves decodes: runs the chunks that were granted, commits pictures, reports both."""

from __future__ import annotations

import time
from functools import partial

import torch
from redis.asyncio import Redis

from services.vae_worker.chunk_runner import ChunkRunner
from services.vae_worker.committer import Committer
from services.vae_worker.compute_pool import ComputePool
from services.vae_worker.decode_queue import Decode, DecodeQueue
from services.vae_worker.granularity import choose_granularity
from services.vae_worker.latents_source import LatentsSource
from services.vae_worker.model import Decoder
from services.vae_worker.unet_beside import UnetBeside
from shared import metrics
from shared.device import finish_work
from shared.errors import HandleLostError, SynerDiffError
from shared.logs import get_logger
from shared.messages import ChunksDecoded, DecodeLatents, HandleLost, RequestFailed
from shared.settings import VaeWorkerSettings
from shared.store.records import Records
from shared.tasks import TaskGroup
from shared.tensors.cuda_ipc import gpu_ipc
from shared.tensors.reader import TensorReader
from shared.watchdog import Patience, Watchdog
from shared.worker import ComputeThread, WorkerLink

log = get_logger()


class Decodes:
    """The decodes of one worker, of which several run side by side.

    Args:
        redis: The connection; the caller owns it.
        settings: As read at the start.
        link: Where reports go.
        compute: Where chunks run.
        decoder: Decodes.
        patience: How long a decode may take.
        watchdog: Watches over what may hang.

    Raises:
        ConfigurationError: A profile can't be read.
    """

    def __init__(
        self,
        *,
        redis: Redis,
        settings: VaeWorkerSettings,
        link: WorkerLink,
        compute: ComputePool,
        decoder: Decoder,
        patience: Patience,
        watchdog: Watchdog,
    ) -> None:
        self._link = link
        self._compute = compute
        self._device = decoder.device
        self._patience = patience
        self._reader = TensorReader(ipc=gpu_ipc(decoder.device))
        self._source = LatentsSource(redis, self._reader, watchdog, patience)
        self._beside = UnetBeside(self._reader)
        records = Records(redis, settings.retention)
        self._committer = Committer(records, link.incarnation, watchdog, patience)
        self._num_committing = 0
        self.queue = DecodeQueue()
        self.runner = ChunkRunner(decoder, choose_granularity(settings, decoder), self._beside)

    @property
    def is_idle(self) -> bool:
        """Whether no decode is here and no picture is on its way to the store."""
        return not (len(self.queue) or self._num_committing or not self._compute.is_idle)

    @property
    def awaits_slot(self) -> bool:
        """Whether a grant could run but for the slot that it has to wait for."""
        return self._compute.has_room and bool(self.queue.waiting())

    def drop_dead_pools(self) -> None:
        """Let go of the pools of producers that are gone."""
        self._reader.drop_dead()

    def begin(self, group: TaskGroup) -> None:
        """Run all grants that can, in tasks of the group."""
        runnable = self.queue.runnable(time.monotonic(), self._beside.has_begun)
        for index, decode in enumerate(runnable):
            if not self._compute.has_room:
                return
            granted = decode.grants[0].command.threads or self._compute.num_threads
            threads = self._compute.threads_for(granted, len(runnable) - index)
            self.queue.begin_run(decode)
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
            self.queue.end_run(decode)
            self._compute.take_back(thread)
            self._link.nudge()
        if image is None:
            return
        self.queue.drop(decode)
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
                self.runner.begin(decode, latents)
            image = await thread.run(
                f"a decode from chunk {decode.num_done} on",
                partial(self.runner.run, decode, share=share),
                within_s=self._patience.within_s(pixels=_pixels(command)),
                threads=threads,
            )
        except HandleLostError as error:
            self._lose(decode, error)
            return None
        except (RuntimeError, MemoryError, SynerDiffError) as error:
            # Raises where a GPU's context is lost. Then the worker ends, and another process can
            # do what this one would only fail.
            await thread.run(
                "a look at the device",
                partial(finish_work, self._device),
                within_s=self._patience.within_s(),
            )
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

    def _lose(self, decode: Decode, error: HandleLostError) -> None:
        """Say that a decode's latents are nowhere."""
        if decode.is_dropped:
            return
        command = decode.command
        self.queue.drop(decode)
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
        self.queue.drop(decode)
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


def _pixels(command: DecodeLatents) -> int:
    return command.parameters.height * command.parameters.width
