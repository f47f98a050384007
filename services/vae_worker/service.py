"""The VAE worker's shell: takes decodes and grants, runs chunks, commits images."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from redis.asyncio import Redis

from services.vae_worker.chunked_decoder import ChunkPlan, Granularity, decode_chunks, plan_chunks
from services.vae_worker.granularity import choose_granularity
from services.vae_worker.image_encoder import encode_image
from services.vae_worker.measure import measure_for, time_chunks
from services.vae_worker.model import Decoder, load_decoder
from shared import metrics
from shared.cuda_ipc import gpu_ipc
from shared.device import finish_work
from shared.device_lock import alone_on
from shared.errors import HandleLostError, SynerDiffError
from shared.logs import get_logger
from shared.messages import (
    BeginEpoch,
    CancelDecode,
    ChunksDecoded,
    ChunksMeasured,
    CommitRefused,
    DecodeLatents,
    GrantChunks,
    HandleLost,
    ImageDecoded,
    MeasureChunks,
    Message,
    ReleaseLatents,
    RequestFailed,
    TensorHandle,
    WorkerAnnounced,
    WorkerInfo,
)
from shared.model_folder import check_model_folder, model_digest
from shared.records import Commit, Outcome, Records
from shared.settings import VaeWorkerSettings, available_threads
from shared.tasks import TaskGroup
from shared.tensor_bytes import unpack_tensor
from shared.tensor_pool import TensorReader
from shared.watchdog import Patience, Watchdog
from shared.worker import ComputeThread, WorkerLink, find_place, keep_helpers_serial, run_beside
from shared.worker_id import make_incarnation, make_worker_id

log = get_logger()

Chunks = Generator[int, None, torch.Tensor]


GRANT_WAIT_S = 10.0
"""A grant bound to a slot waits at most so long for it: nothing waits for a slot that is lost."""

GRANT_POLL_S = 0.002

MAX_PLANS = 64
"""How sizes are cut that were decoded lately; clients choose sizes, and there are thousands."""

CHUNK_LEASE_NS = 2_000_000_000
"""A UNet worker gives way to a chunk for at most so long."""

NEXT_CHUNK_NS = 2_000_000
"""And for so long after it, so that it doesn't take its cores back for the moment between two."""


@dataclass(slots=True, kw_only=True)
class PendingGrant:
    """Chunks that may run.

    left: of them. compute_s: that the others took. expires_at: when they stop to wait for their
    slot, on the monotonic clock.
    """

    command: GrantChunks
    left: int
    expires_at: float
    compute_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Decode:
    """A decode at this worker. grants: oldest first. chunks: None until the first one runs."""

    command: DecodeLatents
    grants: deque[PendingGrant] = field(default_factory=deque)
    done: int = 0
    chunks: Chunks | None = None
    num_chunks: int = 0
    compute_s: float = 0.0
    transport: str = ""


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
        self._threads = settings.threads or available_threads()
        self._watchdog = watchdog or Watchdog()
        self._link = WorkerLink(redis, make_incarnation(worker_id), settings, self._watchdog)
        self._records = Records(redis, settings.retention)
        self._compute = ComputeThread(self._threads, self._watchdog)
        self._patience: Patience
        self._reader: TensorReader
        self._decoder: Decoder
        self._granularity: Granularity
        self._plans: dict[tuple[int, int], ChunkPlan] = {}
        self._decodes: dict[str, Decode] = {}
        self._measurements: deque[MeasureChunks] = deque()
        self._num_committing = 0
        self._epoch = 0

    def stop(self) -> None:
        """Finish the decodes that are here, end; called again: end after the current chunk."""
        self._link.drain()

    async def run(self) -> None:
        """Load, measure, register, decode until stopped."""
        keep_helpers_serial()
        info = await self._compute.run(
            "loading and measuring", self._start_alone, within_s=self._settings.max_start_s
        )
        log.info("ready", decode_ms=round(info.decode_ms, 1), chunks=info.num_chunks)
        async with TaskGroup() as group:
            group.create_task(self._link.run(info))
            group.create_task(self._drop_dead_pools())
            while not self._link.is_stopping:
                await self._link.news()
                self._take_messages()
                while not self._link.is_stopping and self._has_work():
                    decode = self._next_runnable()
                    if self._measurements:
                        await self._measure(self._measurements.popleft())
                    elif decode:
                        await self._run_chunk(decode, group)
                    else:
                        await asyncio.sleep(GRANT_POLL_S)
                    self._take_messages()
                if self._link.may_leave and not (self._decodes or self._num_committing):
                    self._link.stop()
        self._compute.close()
        self._watchdog.close()

    # --- start ----------------------------------------------------------------------------------

    def _start_alone(self) -> WorkerInfo:
        with alone_on(self._settings.device_group or self._settings.device):
            return self._start()

    def _start(self) -> WorkerInfo:
        """Load the VAE and measure a decode of the default size; runs in the compute thread.

        Raises:
            ConfigurationError: The folder holds no VAE, or a profile can't be read.
        """
        settings = self._settings
        check_model_folder(settings.model)
        self._decoder = load_decoder(settings.model, device=settings.device, dtype=settings.dtype)
        self._reader = TensorReader(ipc=gpu_ipc(self._decoder.device))
        self._granularity = choose_granularity(settings, self._decoder)
        size = self._decoder.default_size
        durations_s = [sum(time_chunks(self._decoder, self._plan(*size))) for _ in range(4)]
        factor = self._decoder.scale_factor
        self._patience = Patience(settings.max_call_s, size[0] * size[1] * factor**2)
        self._patience.learn(min(durations_s))
        for height, width in settings.sizes_to_warm_up:
            time_chunks(self._decoder, self._plan(height // factor, width // factor))
        place = find_place(
            self._decoder.device,
            device_group=settings.device_group,
            shares_host=settings.transport == "auto",
        )
        return WorkerInfo(
            worker_id=self._worker_id,
            incarnation=self._link.incarnation,
            kind="vae",
            device_group=place.device_group,
            host=place.host,
            device=place.device,
            runs_side_by_side=place.runs_side_by_side,
            dtype=str(self._decoder.dtype).removeprefix("torch."),
            threads=self._threads,
            max_requests=0,
            model_id=self._decoder.name,
            model_digest=model_digest(settings.model),
            decode_ms=statistics.median(durations_s[1:]) * 1000,
            num_chunks=self._plan(*size).num_chunks,
        )

    def _plan(self, latent_height: int, latent_width: int) -> ChunkPlan:
        size = (latent_height, latent_width)
        plan = self._plans.pop(size, None) or plan_chunks(
            self._decoder.vae,
            latent_height,
            latent_width,
            granularity=self._granularity,
        )
        self._plans[size] = plan  # the most recently used comes last
        if len(self._plans) > MAX_PLANS:
            del self._plans[next(iter(self._plans))]
        return plan

    def _chunks(self, latents: torch.Tensor, plan: ChunkPlan) -> Chunks:
        latents = latents.to(self._decoder.device, self._decoder.dtype)
        return decode_chunks(self._decoder.vae, latents, plan=plan)

    # --- messages -------------------------------------------------------------------------------

    def _take_messages(self) -> None:
        for lane in (self._link.control, self._link.work):
            while lane:
                self._take(lane.popleft())

    def _take(self, message: Message) -> None:
        match message:
            case BeginEpoch(epoch=epoch) if epoch >= self._epoch:
                # Decodes are short and their latents still there: the scheduler asks anew.
                self._epoch = epoch
                self._measurements.clear()
                for decode in list(self._decodes.values()):
                    self._forget(decode)
                self._link.post(WorkerAnnounced(incarnation=self._link.incarnation, epoch=epoch))
            case DecodeLatents() if message.epoch >= self._epoch:
                known = self._decodes.get(message.request_id)
                if known and known.command.attempt != message.attempt:
                    self._forget(known)
                self._decodes.setdefault(message.request_id, Decode(command=message))
            case GrantChunks() if message.epoch >= self._epoch:
                known = self._decodes.get(message.request_id)
                if known and known.command.attempt == message.attempt:
                    known.grants.append(
                        PendingGrant(
                            command=message,
                            left=message.chunks,
                            expires_at=time.monotonic() + GRANT_WAIT_S,
                        )
                    )
            case MeasureChunks() if message.epoch >= self._epoch:
                self._measurements.append(message)
            case CancelDecode():
                known = self._decodes.get(message.request_id)
                if known and known.command.attempt == message.attempt:
                    self._forget(known)
            case _:
                log.debug("ignored", message=type(message).__name__)

    def _has_work(self) -> bool:
        return bool(self._measurements) or any(one.grants for one in self._decodes.values())

    def _next_runnable(self) -> Decode | None:
        runnable = (
            decode
            for decode in self._decodes.values()
            if decode.grants and self._has_begun(decode.grants[0])
        )
        return next(runnable, None)

    def _has_begun(self, grant: PendingGrant) -> bool:
        """Whether the slots that a grant has to wait for are over, or can't be waited for."""
        command = grant.command
        if not command.beside_seq or not command.pool or time.monotonic() >= grant.expires_at:
            return True
        try:
            return self._reader.running_seq(command.pool) >= command.beside_seq
        except HandleLostError:
            return True

    def _forget(self, decode: Decode) -> None:
        self._decodes.pop(decode.command.request_id, None)
        if decode.chunks:
            decode.chunks.close()

    # --- decoding -------------------------------------------------------------------------------

    async def _run_chunk(self, decode: Decode, group: TaskGroup) -> None:
        """Run one chunk; after the last, encode and commit while the next decode begins."""
        command = decode.command
        try:
            if decode.chunks is None:
                latents, decode.transport = await self._fetch(command)
                plan = self._plan(latents.shape[2], latents.shape[3])
                decode.chunks, decode.num_chunks = self._chunks(latents, plan), plan.num_chunks
            image = await self._compute.run(
                f"chunk {decode.done} of a decode",
                partial(self._advance, decode),
                within_s=self._patience.within_s(pixels=_pixels(command)),
                threads=decode.grants[0].command.threads,
            )
        except HandleLostError as error:
            self._forget(decode)
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
            return
        except (RuntimeError, MemoryError, SynerDiffError) as error:
            # Raises where a GPU's context is lost. Then the worker ends, and another process can
            # do what this one would only fail.
            await self._compute.run(
                "a look at the device",
                partial(finish_work, self._decoder.device),
                within_s=self._patience.within_s(),
            )
            self._fail(decode, error)
            return
        self._report_grant(decode, is_last=image is not None)
        if image is not None:
            self._forget(decode)
            metrics.DECODE_SECONDS.observe(decode.compute_s)
            self._num_committing += 1
            commit = group.create_task(self._commit(decode, image))
            commit.add_done_callback(self._on_committed)

    def _on_committed(self, _: asyncio.Task[None]) -> None:
        self._num_committing -= 1
        self._link.nudge()

    def _report_grant(self, decode: Decode, *, is_last: bool) -> None:
        """One report for a grant, once all its chunks have run."""
        grant = decode.grants[0]
        grant.left -= 1
        if grant.left > 0 and not is_last:
            return
        decode.grants.popleft()
        self._link.post(
            ChunksDecoded(
                incarnation=self._link.incarnation,
                request_id=decode.command.request_id,
                attempt=decode.command.attempt,
                chunks_done=decode.done,
                duration_ms=grant.compute_s * 1000,
                num_chunks=decode.num_chunks,
            )
        )

    def _advance(self, decode: Decode) -> torch.Tensor | None:
        """One chunk; the image after the last. Runs in the compute thread."""
        assert decode.chunks is not None
        start = time.perf_counter()
        after_ns = NEXT_CHUNK_NS
        self._tell_unet(decode, CHUNK_LEASE_NS)
        try:
            next(decode.chunks)
            finish_work(self._decoder.device)
        except StopIteration as end:
            after_ns = 0
            image: torch.Tensor = end.value
            return image.float().cpu()
        finally:
            duration_s = time.perf_counter() - start
            decode.done += 1
            decode.compute_s += duration_s
            decode.grants[0].compute_s += duration_s
            self._tell_unet(decode, after_ns)
        return None

    def _tell_unet(self, decode: Decode, busy_ns: int) -> None:
        """Tell the UNet worker on the same device for how long it should give way."""
        pool = decode.grants[0].command.pool
        if pool:
            with contextlib.suppress(HandleLostError):
                self._reader.note_chunks(pool, until_ns=time.monotonic_ns() + busy_ns)

    async def _measure(self, command: MeasureChunks) -> None:
        """Time decodes of dummy latents; no request is touched."""
        factor = self._decoder.scale_factor
        window_s = command.window_ms / 1000

        def measure() -> tuple[float, ...]:
            plan = self._plan(command.height // factor, command.width // factor)
            return measure_for(self._decoder, plan, window_s)

        try:
            patience_s = self._patience.within_s(pixels=command.height * command.width)
            chunk_ms = await self._compute.run(
                "a measurement of decodes",
                measure,
                within_s=window_s + 2 * patience_s,
                threads=command.threads,
            )
        except (RuntimeError, MemoryError) as error:
            log.warning("not measured", error=repr(error))
            chunk_ms = ()
        self._link.post(
            ChunksMeasured(
                incarnation=self._link.incarnation,
                epoch=command.epoch,
                number=command.number,
                chunk_ms=chunk_ms,
            )
        )

    async def _fetch(self, command: DecodeLatents) -> tuple[torch.Tensor, str]:
        """The latents and the transport that served.

        Raises:
            HandleLostError: Neither the pool nor an inline copy has them.
        """
        handle, transport = command.handle, command.transport
        try:
            if transport == "inline":
                latents = await self._fetch_inline(handle)
            else:
                latents = await run_beside(
                    self._watchdog,
                    "a read of latents",
                    partial(self._reader.read, handle),
                    within_s=self._patience.within_s(),
                )
        except HandleLostError as error:
            if transport == "inline":
                raise
            log.warning("falls back on the inline copy", reason=str(error), transport=transport)
            latents, transport = await self._fetch_inline(handle), "inline"
        metrics.TRANSFERS.labels(transport=transport).inc()
        return latents, transport

    async def _fetch_inline(self, handle: TensorHandle) -> torch.Tensor:
        payload = await cast("Any", self._redis.hget(handle.inline_key, "data"))
        if payload is None:
            raise HandleLostError("neither the pool nor an inline copy holds the latents")
        return unpack_tensor(payload, handle.shape, handle.dtype)

    async def _commit(self, decode: Decode, image: torch.Tensor) -> None:
        command = decode.command
        parameters = command.parameters
        try:
            encode = partial(
                encode_image, image, parameters=parameters, skipped_steps=command.skipped_steps
            )
            encoded = await run_beside(
                self._watchdog,
                "the encoding of a picture",
                encode,
                within_s=self._patience.within_s(pixels=_pixels(command)),
            )
        except SynerDiffError as error:
            self._fail(decode, error)
            return
        metrics.IMAGES_ENCODED.labels(format=parameters.output_format).inc()
        handle = command.handle
        commit = Commit(
            decoded=ImageDecoded(
                incarnation=self._link.incarnation,
                request_id=command.request_id,
                attempt=command.attempt,
                decode_ms=decode.compute_s * 1000,
                transport=decode.transport,
            ),
            image=encoded,
            outcome=Outcome(
                content_type=f"image/{parameters.output_format}",
                size_bytes=len(encoded),
                seed=parameters.seed,
                skipped_steps=command.skipped_steps,
                warnings=command.warnings,
                decode_s=decode.compute_s,
                transport=decode.transport,
            ),
            release=ReleaseLatents(slot=handle.slot, generation=handle.generation),
            release_to=command.release_to,
        )
        if not await self._records.commit(commit):
            log.info("commit lost to a final state or newer attempt", request=command.request_id)
            self._link.post(
                CommitRefused(
                    incarnation=self._link.incarnation,
                    request_id=command.request_id,
                    attempt=command.attempt,
                )
            )

    def _fail(self, decode: Decode, error: Exception) -> None:
        command = decode.command
        self._forget(decode)
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


def _pixels(command: DecodeLatents) -> int:
    return command.parameters.height * command.parameters.width
