"""`synerdiff bench loop`: the stack against a bare loop that does the same work in one process."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import aiohttp
import torch
import typer

from bench.report import spread, write_report
from bench.side_by_side import child_environment
from launch.private_stack import private_stack
from launch.stack import EMBEDDED_MODEL, WORKER_ENVIRONMENT
from services.unet_worker.backends.choice import choose_backend
from services.unet_worker.denoising.denoiser import Denoiser, FinishedLatents
from services.unet_worker.families.loading import load_family
from services.vae_worker.decoding import Granularity, decode_chunks, plan_chunks
from services.vae_worker.image_encoder import encode_image
from services.vae_worker.model import load_decoder
from shared.messages import ImageParameters, SlotRow
from shared.settings import available_threads

MAX_ROWS = 8
RESIDENT = 2 * MAX_ROWS
"""Rows held at once, as the scheduler admits them: two slots' worth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One measurement of both, one after the other. Seconds for the same requests."""

    stack_s: float
    bare_s: float
    busy_fraction: float


def make_requests(count: int, *, size: tuple[int, int], seed: int) -> list[ImageParameters]:
    """Mixed requests of one (height, width): 10 to 30 steps, all guided."""
    height, width = size
    rng = random.Random(seed)
    return [
        ImageParameters(
            prompt=rng.choice(["red apple", "cat face", "rocket", "sunflower", "pizza"]),
            negative_prompt="",
            seed=number,
            height=height,
            width=width,
            num_inference_steps=rng.randint(10, 30),
            guidance_scale=5.0,
            sampler="ddim",
            guidance_skip="off",
            output_format="png",
            output_compression=100,
            model=EMBEDDED_MODEL.name,
        )
        for number in range(count)
    ]


class BareLoop:
    """Denoiser, decoder and image encoder in one process, with nothing between them."""

    def __init__(self) -> None:
        torch.set_num_threads(available_threads())
        self._family = load_family(EMBEDDED_MODEL)
        self._backend = choose_backend(self._family)
        self._backend.prepare()
        self._decoder = load_decoder(EMBEDDED_MODEL)
        facts = self._family.facts
        factor = self._family.latents_format.vae_scale_factor
        self.size = (facts.default_height, facts.default_width)
        self._plan = plan_chunks(
            self._decoder.vae,
            facts.default_height // factor,
            facts.default_width // factor,
            granularity=Granularity(num_chunks=1),
        )

    def run(self, requests: Sequence[ImageParameters]) -> float:
        """Seconds to make all pictures, in slots of `MAX_ROWS` rows, oldest first."""
        denoiser = Denoiser(self._family, self._backend, max_requests=RESIDENT)
        waiting = deque(enumerate(requests))
        steps: dict[str, int] = {}
        start = time.perf_counter()
        while waiting or steps:
            while waiting and 2 * len(steps) < RESIDENT:
                number, parameters = waiting.popleft()
                denoiser.admit(str(number), "", parameters)
                steps[str(number)] = 0
            rows = tuple(
                SlotRow(request_id=name, attempt="", step_index=step)
                for name, step in list(steps.items())[: MAX_ROWS // 2]
            )
            result = denoiser.run(rows)
            for row in rows:
                steps[row.request_id] += 1
            for finished in result.finished:
                del steps[finished.request_id]
                self._decode(finished, requests[int(finished.request_id)])
        return time.perf_counter() - start

    def _decode(self, finished: FinishedLatents, parameters: ImageParameters) -> None:
        latents = finished.latents.to(self._decoder.dtype)
        chunks = decode_chunks(self._decoder.vae, latents, plan=self._plan)
        while True:
            try:
                next(chunks)
            except StopIteration as end:
                encode_image(end.value, parameters=parameters)
                return


@cache
def _bare_loop() -> BareLoop:
    """This process's one; it lives in a process started as a worker is."""
    return BareLoop()


def _bare_size() -> tuple[int, int]:
    return _bare_loop().size


def _run_bare(requests: Sequence[ImageParameters]) -> float:
    return _bare_loop().run(requests)


@contextlib.contextmanager
def _bare_process() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with child_environment(WORKER_ENVIRONMENT), ProcessPoolExecutor(1, context) as process:
        yield process


def _body(parameters: ImageParameters) -> dict[str, Any]:
    return {
        "prompt": parameters.prompt,
        "seed": parameters.seed,
        "num_inference_steps": parameters.num_inference_steps,
        "guidance_scale": parameters.guidance_scale,
        "sampler": parameters.sampler,
        "response_format": "url",
    }


async def _busy_s(session: aiohttp.ClientSession) -> float:
    """Seconds that the compute threads of all workers have spent on slots and decodes."""
    async with session.get("/metrics") as reply:
        lines = (await reply.text()).splitlines()
    names = ("synerdiff_step_seconds_sum", "synerdiff_decode_seconds_sum")
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


async def _run_stack(url: str, requests: Sequence[ImageParameters]) -> tuple[float, float]:
    """Seconds to make all pictures, and the share of them that the compute threads were busy."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:

        async def post(parameters: ImageParameters) -> None:
            async with session.post("/v1/images/generations", json=_body(parameters)) as reply:
                reply.raise_for_status()

        busy_before = await _busy_s(session)
        start = time.perf_counter()
        await asyncio.gather(*(post(parameters) for parameters in requests))
        duration = time.perf_counter() - start
        return duration, (await _busy_s(session) - busy_before) / duration


def run(
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Less certain, under 50 s.")] = False,
) -> dict[str, float]:
    """Throughput of the whole stack with a standing backlog over that of a bare loop.

    Both make the same pictures in slots of the same size with the decodes between them
    (`continuous-serial`), alternating. Returns: `busy_fraction` (share of the time in which the
    stack's compute threads run slots and decodes), `stack_to_bare_ratio` (throughputs).
    """
    num_rounds, num_requests = (2, 12) if quick else (5, 40)
    rounds: list[Round] = []
    stack = private_stack("--policy", "continuous-serial", settings={"max_rows": MAX_ROWS})
    with _bare_process() as bare, stack as url:
        size = bare.submit(_bare_size).result()
        for number in range(-1, num_rounds):
            count = num_requests if number >= 0 else 4
            requests = make_requests(count, size=size, seed=seed + number + 1)
            stack_s, busy = asyncio.run(_run_stack(url, requests))
            bare_s = bare.submit(_run_bare, requests).result()
            if number >= 0:  # the first warms both up
                rounds.append(Round(stack_s=stack_s, bare_s=bare_s, busy_fraction=busy))
                print(f"round {number + 1}: stack {stack_s:.2f} s, bare {bare_s:.2f} s")
    ratio = spread([one.bare_s / one.stack_s for one in rounds])
    busy_fraction = spread([one.busy_fraction for one in rounds])
    write_report(
        "loop",
        {
            "requests": num_requests,
            "max_rows": MAX_ROWS,
            "stack_s": [one.stack_s for one in rounds],
            "bare_s": [one.bare_s for one in rounds],
            "stack_to_bare_ratio": ratio,
            "busy_fraction": busy_fraction,
        },
    )
    return {
        "busy_fraction": round(busy_fraction["median"], 4),
        "stack_to_bare_ratio": round(ratio["median"], 4),
    }
