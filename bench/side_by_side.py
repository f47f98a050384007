"""Two real processes, one with the UNet and one with the decoder, timed alone and side by side.

What the profiler and `bench contention` measure with. Each process computes as its worker does: one
compute thread, `torch.set_num_threads` before a call, the same environment.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import torch

from launch.stack import WORKER_ENVIRONMENT
from shared.device import DtypeName
from shared.messages import ImageParameters

TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One UNet forward. threads: 0 for the library's default."""

    height: int
    width: int
    rows: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """So many decode chunks, over as many decodes as they need; 0 for all of one decode.

    max_strip_fraction: how the decodes are cut, besides the pair's number of chunks.
    """

    height: int
    width: int
    num_chunks: int
    threads: int
    max_strip_fraction: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one side. parts: of each chunk."""

    seconds: float
    parts: tuple[float, ...] = ()


class Pair:
    """The two processes; use `running_pair`."""

    def __init__(self, unet: Connection, vae: Connection) -> None:
        self._unet = unet
        self._vae = vae

    def forward(self, forward: Forward) -> Timing:
        """A forward alone."""
        return self._ask(self._unet, (forward, False))

    def chunks(self, chunks: Chunks) -> Timing:
        """Chunks alone."""
        return self._ask(self._vae, (chunks, False))

    def whole_decode(
        self, height: int, width: int, threads: int, *, max_strip_fraction: float = 0.0
    ) -> Timing:
        """One decode alone, chunk by chunk."""
        return self.chunks(
            Chunks(
                height=height,
                width=width,
                num_chunks=0,
                threads=threads,
                max_strip_fraction=max_strip_fraction,
            )
        )

    def together(self, forward: Forward, chunks: Chunks) -> tuple[Timing, Timing]:
        """Both, started at the same moment.

        If the chunks outlast the forward, further forwards keep them company, untimed.
        """
        self._unet.send((forward, True))
        self._vae.send((chunks, True))
        return _receive(self._unet), _receive(self._vae)

    def encode_s(self, prompt: str) -> float:
        """Seconds to encode a prompt, alone."""
        return self._ask(self._unet, (prompt, False)).seconds

    def _ask(self, side: Connection, question: tuple[Any, bool]) -> Timing:
        side.send(question)
        return _receive(side)


def _receive(side: Connection) -> Timing:
    if not side.poll(TIMEOUT_S):
        raise TimeoutError("a measuring process does not answer")
    answer = side.recv()
    if isinstance(answer, BaseException):
        raise answer
    assert isinstance(answer, Timing)
    return answer


@contextlib.contextmanager
def running_pair(
    model: Path,
    *,
    device: str = "auto",
    dtype: DtypeName = "auto",
    num_chunks: int,
    environment: dict[str, str] | None = None,
) -> Iterator[Pair]:
    """Both processes with their halves of the model loaded.

    num_chunks: chunks a decode is cut into. environment: set before either imports torch; by
    default that of a worker.
    """
    context = multiprocessing.get_context("spawn")
    start, chunks_done = context.Barrier(2), context.Event()
    ends = []
    processes = []
    with child_environment(WORKER_ENVIRONMENT if environment is None else environment):
        for side in (_unet_side, _vae_side):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(side, theirs, start, chunks_done, model, device, dtype, num_chunks),
                daemon=True,
            )
            process.start()
            ends.append(ours)
            processes.append(process)
    try:
        for end in ends:
            _receive(end)
        yield Pair(*ends)
    finally:
        for process in processes:
            process.terminate()
            process.join()


@contextlib.contextmanager
def child_environment(values: dict[str, str]) -> Iterator[None]:
    """Processes started meanwhile have these environment variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


# --- in the processes ------------------------------------------------------------------------


def _serve(  # noqa: PLR0917 - a process's target takes its arguments by position
    make_side: Callable[..., Any],
    connection: Connection,
    start: Barrier,
    chunks_done: Event,
    model: Path,
    device: str,
    dtype: DtypeName,
    num_chunks: int,
) -> None:
    """Answer questions until terminated."""
    default_threads = torch.get_num_threads()
    try:
        side = make_side(model, device, dtype, num_chunks)
        connection.send(Timing(seconds=0.0))
        while True:
            task, is_together = connection.recv()
            torch.set_num_threads(getattr(task, "threads", 0) or default_threads)
            side.prepare(task)
            if is_together:
                chunks_done.clear()
                start.wait()
            connection.send(side.run(task, chunks_done if is_together else None))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - it is raised again in the asking process
        connection.send(error)


def _unet_side(model: Path, device: str, dtype: DtypeName, num_chunks: int) -> _UnetSide:
    del num_chunks
    return _UnetSide(model, device, dtype)


def _vae_side(model: Path, device: str, dtype: DtypeName, num_chunks: int) -> _VaeSide:
    return _VaeSide(model, device, dtype, num_chunks)


class _UnetSide:
    def __init__(self, model: Path, device: str, dtype: DtypeName) -> None:
        from services.unet_worker.backends.choice import choose_backend  # noqa: PLC0415
        from services.unet_worker.families.loading import load_family  # noqa: PLC0415

        self._family = load_family(model, device=device, dtype=dtype)
        self._backend = choose_backend(self._family)
        self._backend.prepare()
        self._num_prompts = 0
        self._inputs: tuple[Any, ...] = ()

    def prepare(self, task: Forward | str) -> None:
        """Make the inputs before the clock runs."""
        from services.unet_worker.backends.measure import zero_inputs  # noqa: PLC0415

        if isinstance(task, str):
            return
        zeros = zero_inputs(self._family, task.rows, task.height, task.width)
        torch.manual_seed(0)
        sample, _, conditions = zeros
        self._inputs = (
            torch.randn_like(sample),
            torch.full((task.rows,), 500.0, device=self._family.device),
            {name: torch.randn_like(values) for name, values in conditions.items()},
        )

    @torch.inference_mode()
    def run(self, task: Forward | str, chunks_done: Event | None) -> Timing:
        """Time one forward, then keep the chunks company."""
        begin = time.perf_counter()
        if isinstance(task, str):
            self._encode(task)
            return Timing(seconds=time.perf_counter() - begin)
        self._forward()
        seconds = time.perf_counter() - begin
        while chunks_done is not None and not chunks_done.is_set():
            self._forward()
        return Timing(seconds=seconds)

    def _encode(self, prompt: str) -> None:
        """Encode a prompt that is in no cache."""
        self._num_prompts += 1
        self._family.encode(
            ImageParameters(
                prompt=f"{prompt} {self._num_prompts}",
                negative_prompt="",
                seed=0,
                height=0,
                width=0,
                num_inference_steps=1,
                guidance_scale=1.0,
                sampler="",
                guidance_skip="off",
                output_format="",
                output_compression=0,
                model="",
            )
        )

    def _forward(self) -> None:
        self._backend.predict(*self._inputs)
        self._backend.finish()


class _VaeSide:
    def __init__(self, model: Path, device: str, dtype: DtypeName, num_chunks: int) -> None:
        from services.vae_worker.model import load_decoder  # noqa: PLC0415

        self._decoder = load_decoder(model, device=device, dtype=dtype)
        self._num_chunks = num_chunks
        self._plan: Any = None
        self._latents: torch.Tensor

    def prepare(self, task: Chunks) -> None:
        """Cut the decode before the clock runs."""
        from services.vae_worker.decoding import Granularity, plan_chunks  # noqa: PLC0415

        config = self._decoder.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        size = (task.height // factor, task.width // factor)
        granularity = Granularity(
            num_chunks=self._num_chunks, max_strip_fraction=task.max_strip_fraction or None
        )
        self._plan = plan_chunks(self._decoder.vae, *size, granularity=granularity)
        self._latents = torch.randn(1, config.latent_channels, *size).to(
            self._decoder.device, self._decoder.dtype
        )

    def run(self, task: Chunks, chunks_done: Event | None) -> Timing:
        """Time every chunk."""
        wanted = task.num_chunks or self._plan.num_chunks
        parts: list[float] = []
        while len(parts) < wanted:
            parts += self._decode(wanted - len(parts))
        if chunks_done is not None:
            chunks_done.set()
        return Timing(seconds=sum(parts), parts=tuple(parts))

    def _decode(self, limit: int) -> list[float]:
        from services.vae_worker.decoding import decode_chunks  # noqa: PLC0415

        chunks = decode_chunks(self._decoder.vae, self._latents, plan=self._plan)
        parts = []
        for _ in range(min(limit, self._plan.num_chunks)):
            begin = time.perf_counter()
            next(chunks, None)
            _synchronise(self._decoder.device)
            parts.append(time.perf_counter() - begin)
        chunks.close()
        return parts


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
