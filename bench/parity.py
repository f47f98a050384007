"""`synerdiff bench parity`: the stack's pictures against diffusers' own, pixel by pixel."""

from __future__ import annotations

import asyncio
import io
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import aiohttp
import diffusers
import numpy as np
import numpy.typing as npt
import torch
import typer
from PIL import Image

from bench.report import spread, write_report
from launch.private_stack import private_stack
from launch.stack import EMBEDDED_MODEL
from services.unet_worker.backends.eager import EagerBackend
from services.unet_worker.denoising.denoiser import Denoiser
from services.unet_worker.denoising.samplers import SAMPLERS
from services.unet_worker.families.loading import load_family
from services.vae_worker.image_encoder import to_pixels
from services.vae_worker.model import load_decoder
from shared.messages import ImageParameters, SlotRow
from shared.settings import available_threads

Pixels = npt.NDArray[np.int16]
ARRIVAL_S = 0.3
"""Mean time between arrivals: short, so that requests of all ages share every forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One random request."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str

    def body(self) -> dict[str, Any]:
        """The request as a client sends it."""
        fields = asdict(self)
        size = f"{fields.pop('width')}x{fields.pop('height')}"
        return {**fields, "size": size, "guidance_skip": "off", "response_format": "url"}


def make_cases(count: int, *, default_size: int, side_multiple: int, seed: int) -> list[Case]:
    """Random requests over all samplers; two thirds of the default size, the rest of others."""
    rng = random.Random(seed)
    words = ["red apple", "cat face", "rocket", "blue heart", "pizza", "a happy dog", "sun"]
    step = max(side_multiple, 32)
    sides = [default_size - step, default_size, default_size + step]
    cases = []
    for number in range(count):
        is_default = rng.random() < 2 / 3
        cases.append(
            Case(
                prompt=rng.choice(words),
                negative_prompt=rng.choice(["", "", "yellow", "blurred, green"]),
                seed=rng.randrange(2**32),
                width=default_size if is_default else rng.choice(sides),
                height=default_size if is_default else rng.choice(sides),
                num_inference_steps=rng.randint(1, 30),
                guidance_scale=round(rng.uniform(1, 12), 1),
                sampler=list(SAMPLERS)[number % len(SAMPLERS)],
            )
        )
    return cases


class Reference:
    """Diffusers' own pipeline on the same folder, in float32."""

    def __init__(self) -> None:
        self._pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(
            EMBEDDED_MODEL, torch_dtype=torch.float32, local_files_only=True
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._config = self._pipeline.scheduler.config

    def picture(self, case: Case) -> Pixels:
        """The pipeline's 8-bit picture of a case, shape (height, width, 3)."""
        class_name, overrides = SAMPLERS[case.sampler]
        scheduler_class = getattr(diffusers, class_name)
        self._pipeline.scheduler = scheduler_class.from_config(self._config, **overrides)
        with torch.inference_mode():
            reply = self._pipeline(
                prompt=case.prompt,
                negative_prompt=case.negative_prompt or None,
                width=case.width,
                height=case.height,
                num_inference_steps=case.num_inference_steps,
                guidance_scale=case.guidance_scale,
                generator=torch.Generator().manual_seed(case.seed),
            )
        return _pixels(reply.images[0])


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


async def _generate(session: aiohttp.ClientSession, case: Case) -> Pixels:
    async with session.post("/v1/images/generations", json=case.body()) as reply:
        if reply.status != 200:  # noqa: PLR2004
            raise RuntimeError(f"{case}: {await reply.text()}")
        url = (await reply.json())["data"][0]["url"]
    async with session.get(url) as reply:
        return _pixels(Image.open(io.BytesIO(await reply.read())))


async def _run_stack(
    url: str, cases: Sequence[Case], *, num_alone: int, seed: int
) -> tuple[list[Pixels], list[Pixels]]:
    """Every picture among random arrivals, and the first `num_alone` again, each alone."""
    rng = random.Random(seed)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        tasks = []
        for case in cases:
            tasks.append(asyncio.create_task(_generate(session, case)))
            await asyncio.sleep(rng.expovariate(1 / ARRIVAL_S))
        together = await asyncio.gather(*tasks)
        return list(together), [await _generate(session, case) for case in cases[:num_alone]]


def _differences(alone: Sequence[Pixels], together: Sequence[Pixels]) -> list[int]:
    """Return the largest difference of each picture alone to the same among others."""
    return [
        int(np.abs(picture - other).max()) for picture, other in zip(alone, together, strict=False)
    ]


def _bfloat16_psnr_db(reference: Reference, cases: Sequence[Case]) -> list[float]:
    """PSNR of UNet and VAE in bfloat16 against the float32 pipeline, a value per case."""
    family = load_family(EMBEDDED_MODEL, dtype="bfloat16")
    decoder = load_decoder(EMBEDDED_MODEL, dtype="bfloat16")
    denoiser = Denoiser(family, EagerBackend(family))
    values = []
    for number, case in enumerate(cases):
        fields = {**asdict(case), "guidance_skip": "off", "model": EMBEDDED_MODEL.name}
        parameters = ImageParameters(**fields, output_format="png", output_compression=100)
        name = str(number)
        admission = denoiser.admit(name, "", parameters)
        for step in range(admission.num_forwards):
            result = denoiser.run([SlotRow(request_id=name, attempt="", step_index=step)])
        latents = result.finished[0].latents.to(decoder.dtype)
        with torch.inference_mode():
            image = decoder.vae.decode(latents / decoder.vae.config.scaling_factor).sample
        error = _pixels(to_pixels(image)) - reference.picture(case)
        values.append(10 * math.log10(255**2 / max(float(np.mean(np.square(error))), 1e-9)))
    return values


def run(
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Less certain, under 50 s.")] = False,
) -> dict[str, float]:
    """Random requests over all samplers and sizes, arriving at random moments, against diffusers.

    Returns: `requests`; `max_diff_8bit`, the largest difference of any channel of any pixel to
    `StableDiffusionPipeline`'s picture; `neighbours_max_diff_8bit`, the same between a request
    among others and alone, in float32; `default_dtype_neighbours_max_diff_8bit`, the same in the
    dtype that workers choose here; `bf16_psnr_db`, median PSNR of bfloat16 against float32.
    """
    count, num_alone, num_bf16 = (18, 4, 1) if quick else (100, 12, 4)
    torch.set_num_threads(available_threads())
    config = json.loads((EMBEDDED_MODEL / "unet" / "config.json").read_text())
    vae = json.loads((EMBEDDED_MODEL / "vae" / "config.json").read_text())
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    cases = make_cases(
        count, default_size=config["sample_size"] * factor, side_multiple=factor, seed=seed
    )
    with private_stack("--dtype", "float32") as url:
        together, alone = asyncio.run(_run_stack(url, cases, num_alone=num_alone, seed=seed))
    neighbours = _differences(alone, together)
    with private_stack() as url:
        together_by_default, alone_by_default = asyncio.run(
            _run_stack(url, cases[: 3 * num_alone], num_alone=num_alone, seed=seed)
        )
    default_neighbours = _differences(alone_by_default, together_by_default)
    reference = Reference()
    differences = []
    for case, picture in zip(cases, together, strict=True):
        differences.append(int(np.abs(picture - reference.picture(case)).max()))
        print(
            f"{case.sampler:16} {case.num_inference_steps:3} steps: {differences[-1]}", flush=True
        )
    short = [replace(case, num_inference_steps=10, sampler="ddim") for case in cases[:num_bf16]]
    psnr_db = _bfloat16_psnr_db(reference, short)
    write_report(
        "parity",
        {
            "cases": [
                {**asdict(case), "max_diff_8bit": difference}
                for case, difference in zip(cases, differences, strict=True)
            ],
            "neighbours_max_diff_8bit": neighbours,
            "default_dtype_neighbours_max_diff_8bit": default_neighbours,
            "bf16_psnr_db": psnr_db,
        },
    )
    return {
        "requests": count,
        "max_diff_8bit": max(differences),
        "neighbours_max_diff_8bit": max(neighbours),
        "default_dtype_neighbours_max_diff_8bit": max(default_neighbours),
        "bf16_psnr_db": round(spread(psnr_db)["median"], 2),
    }
