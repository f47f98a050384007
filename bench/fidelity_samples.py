"""Draws requests in every way that `bench fidelity` compares; runs in processes of one thread."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench.drawing import Case, Drawing, Studio, anywhere
from bench.picture_metrics import foreground_psnr_db, gmsd, psnr_db, ssim
from launch.stack import EMBEDDED_MODEL
from services.unet_worker.families.loading import load_family
from services.vae_worker.model import load_decoder
from shared.guidance_skip import SKIP_LEVELS, SkipParameters
from training.retrieval import REFERENCE_SIZE, References, load_references

LEVELS = tuple(name for name, parameters in SKIP_LEVELS.items() if parameters)

Sample = dict[str, Any]
"""{"case": a `Case`'s fields, "arms": {way to draw: its measures}}."""

_FIRST_RANDOM_STEP = 2  # the extrapolation needs two directions


def fingerprint() -> str:
    """Return what a sample depends on besides its request: weights and skip levels."""
    digest = hashlib.sha256(repr(dict(SKIP_LEVELS)).encode())
    for path in sorted(EMBEDDED_MODEL.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class _Process:
    """What a process holds: the studio, and what pictures should look like."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.studio = open_studio()
        self.references: References = load_references(EMBEDDED_MODEL)
        self.groups = self.references.groups()


_process: _Process


def start_process() -> None:
    """Load the model once in each process of the pool."""
    global _process  # noqa: PLW0603 - a pool's initializer has no other place for it
    _process = _Process()


def open_studio() -> Studio:
    """Return a studio on the embedded model, in float32, with the levels and their baselines."""
    levels: dict[str, SkipParameters | None] = dict(SKIP_LEVELS)
    for name, parameters in SKIP_LEVELS.items():
        if parameters:
            levels[f"{name}_random"] = anywhere(parameters)
    return Studio(
        load_family(EMBEDDED_MODEL, dtype="float32"),
        load_decoder(EMBEDDED_MODEL, dtype="float32"),
        EMBEDDED_MODEL,
        levels,
    )


def measure_cases(cases: Sequence[Case], compared: Sequence[Case]) -> list[Sample]:
    """Return a sample of each case; those `compared` are drawn by the baselines, too."""
    drawings = {"full": [Drawing(case=case) for case in cases]}
    drawings |= {level: [Drawing(case=case, level=level) for case in cases] for level in LEVELS}
    latents, skipped = _draw(drawings)
    for level in LEVELS:
        counts = {case: len(steps) for case, steps in skipped[level].items()}
        drawings[f"{level}_drop"] = [
            Drawing(case=case, unguided_from=case.num_inference_steps - counts[case])
            for case in compared
        ]
        drawings[f"{level}_random"] = [
            Drawing(case=case, level=f"{level}_random", skips=_random_steps(case, counts[case]))
            for case in compared
        ]
    more_latents, more_skipped = _draw(
        {arm: group for arm, group in drawings.items() if arm not in latents}
    )
    arms = _measure(latents | more_latents, skipped | more_skipped)
    return [
        {
            "case": asdict(case),
            "arms": {arm: measures[case] for arm, measures in arms.items() if case in measures},
        }
        for case in cases
    ]


def _random_steps(case: Case, count: int) -> frozenset[int]:
    steps = range(_FIRST_RANDOM_STEP, case.num_inference_steps)
    return frozenset(random.Random(case.seed).sample(steps, count))


def _draw(
    drawings: dict[str, list[Drawing]],
) -> tuple[dict[str, dict[Case, Tensor]], dict[str, dict[Case, list[int]]]]:
    """Return latents, and the steps without a negative row, by way to draw and case."""
    flat = [drawing for group in drawings.values() for drawing in group]
    finished = iter(_process.studio.denoise(flat))
    latents: dict[str, dict[Case, Tensor]] = {}
    skipped: dict[str, dict[Case, list[int]]] = {}
    for arm, group in drawings.items():
        latents[arm], skipped[arm] = {}, {}
        for drawing in group:
            result = next(finished)
            steps = list(result.skipped_steps)
            if drawing.unguided_from is not None:
                steps = list(range(drawing.unguided_from, drawing.case.num_inference_steps))
            latents[arm][drawing.case], skipped[arm][drawing.case] = result.latents, steps
    return latents, skipped


def _measure(
    latents: dict[str, dict[Case, Tensor]], skipped: dict[str, dict[Case, list[int]]]
) -> dict[str, dict[Case, dict[str, Any]]]:
    """Return the measures of every picture, by way to draw and case."""
    pictures = {
        arm: dict(zip(group, _process.studio.decode(list(group.values())), strict=True))
        for arm, group in latents.items()
        if group
    }
    arms: dict[str, dict[Case, dict[str, Any]]] = {}
    for arm, by_case in pictures.items():
        cases, drawn = list(by_case), torch.stack(list(by_case.values()))
        measures: dict[str, list[Any]] = {"is_hit": _hits(cases, drawn)}
        if arm != "full":
            full = torch.stack([pictures["full"][case] for case in cases])
            steps = skipped[arm]
            measures |= {
                "skipped": [steps[case] for case in cases],
                "rows_saved": [len(steps[case]) / (2 * case.num_inference_steps) for case in cases],
                "psnr_db": _rounded(psnr_db(drawn, full)),
                "foreground_db": _rounded(foreground_psnr_db(drawn, full)),
                "ssim": _rounded(ssim(drawn, full)),
                "gmsd": _rounded(gmsd(drawn, full)),
            }
        arms[arm] = {
            case: {name: values[i] for name, values in measures.items()}
            for i, case in enumerate(cases)
        }
    return arms


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _hits(cases: Sequence[Case], pictures: Tensor) -> list[bool]:
    """Return whether each picture is nearest to the reference that its caption names."""
    blocks = pictures.shape[-1] // REFERENCE_SIZE
    small = torch.nn.functional.avg_pool2d(pictures, blocks)
    groups = _process.groups
    nearest = _process.references.nearest(small)
    return [
        groups[case.picture] == groups[reference]
        for case, reference in zip(cases, nearest, strict=True)
    ]
