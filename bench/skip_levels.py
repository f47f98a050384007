"""The fidelity table of a profile: what each skip level saves and costs on a few requests.

Any model can be measured so; `bench fidelity` is the thorough form for the embedded one.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from bench.drawing import Case, Drawing, Studio
from bench.picture_metrics import psnr_db
from bench.report import percentile
from services.scheduler.devices.profile import SkipLevel
from services.unet_worker.families.loading import load_family
from services.vae_worker.model import load_decoder
from shared.device import DtypeName
from shared.guidance_skip import SKIP_LEVELS

PROMPTS = (
    "red apple",
    "cat face",
    "rocket",
    "blue heart",
    "pizza",
    "a happy dog",
    "sun",
    "green tree",
    "bicycle",
    "birthday cake",
    "house",
    "snowman",
)


def measure_skip_levels(
    folder: Path, *, device: str, dtype: DtypeName, threads: int
) -> dict[str, SkipLevel]:
    """Compare the pictures of `PROMPTS` at every level with those of full guidance.

    25 DDIM steps at guidance 5.
    """
    torch.set_num_threads(threads)
    studio = Studio(
        load_family(folder, device=device, dtype=dtype),
        load_decoder(folder, device=device, dtype=dtype),
        folder,
        SKIP_LEVELS,
    )
    cases = [Case(caption=prompt, picture=0, seed=i) for i, prompt in enumerate(PROMPTS)]
    full = studio.decode(
        [drawn.latents for drawn in studio.denoise([Drawing(case=c) for c in cases])]
    )
    levels = {}
    for name in (name for name, parameters in SKIP_LEVELS.items() if parameters):
        finished = studio.denoise([Drawing(case=case, level=name) for case in cases])
        distances = psnr_db(studio.decode([drawn.latents for drawn in finished]), full).tolist()
        saved = [
            len(drawn.skipped_steps) / (2 * case.num_inference_steps)
            for drawn, case in zip(finished, cases, strict=True)
        ]
        levels[name] = SkipLevel(
            rows_saved=round(statistics.fmean(saved), 3),
            psnr_mean_db=round(statistics.fmean(distances), 1),
            psnr_p5_db=round(percentile(distances, 0.05), 1),
        )
    return levels
