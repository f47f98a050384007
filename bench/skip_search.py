"""`synerdiff bench skip_search`: the search for the skip levels' parameters.

On the references that `bench fidelity` does not report on: requests are recorded in full, thousands
of parameters are replayed over the records (`skip_replay`), and the best of them are drawn for
real. What it finds is written into `shared.guidance_skip` by hand.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Annotated, Any

import numpy as np
import torch
import typer

from bench.drawing import Case, Drawing, Studio, anywhere
from bench.fidelity import Cell
from bench.picture_metrics import psnr_db
from bench.report import percentile, write_report
from bench.skip_estimators import compare_estimators
from bench.skip_replay import Replay, join, make_replay, replay
from bench.trajectories import measure_gains, record
from launch.stack import EMBEDDED_MODEL
from services.unet_worker.families.loading import load_family
from services.vae_worker.model import load_decoder
from shared.guidance_skip import SKIP_LEVELS, SkipParameters
from shared.settings import available_threads
from training.retrieval import load_references

TARGETS = {"balanced": 0.305, "fast": 0.375}
"""Share of rows that each level should save: a little more than is asked for."""

NUM_DRAWN = 4
"""Candidates drawn for real, per level."""

NUM_GAIN_CASES = 4
GAIN_STEPS = 9

Found = list[tuple[float, SkipParameters]]


def run(  # noqa: PLR0917 - options of a command
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Less certain, under 50 s.")] = False,
    sampler: str = "ddim",
    steps: Annotated[int, typer.Option(min=4)] = 25,
    guidance_scale: float = 5.0,
    prompts: Annotated[int, typer.Option(min=8, help="Requests to tune on.")] = 24,
) -> dict[str, Any]:
    """Search for skip parameters at one sampler, number of steps and guidance scale.

    Returns, for each level, the parameters found and what they save and cost when drawn for real.
    """
    count, num_candidates, num_drawn = (8, 60, 1) if quick else (prompts, 800, NUM_DRAWN)
    cell = Cell(
        num_prompts=count,
        sampler=sampler,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
    )
    cases = cell.cases(load_references(EMBEDDED_MODEL), half=0, seed=seed + 50_000)
    shares = [cases[first :: available_threads()] for first in range(available_threads())]
    with ProcessPoolExecutor(len(shares), mp_context=get_context("spawn")) as pool:
        records = list(pool.map(_record, shares))
        for name, error in records[0][1].items():
            print(f"{error:.3f} of the last direction's error: {name}")
        recorded = join([part for part, _ in records])
        candidates = _search(recorded, random.Random(seed), num_candidates)
        levels = {
            f"{target}_{i}": parameters
            for target, found in candidates.items()
            for i, (_, parameters) in enumerate(found[:num_drawn])
        }
        levels |= {f"{name}_now": level for name, level in SKIP_LEVELS.items() if level}
        drawn = list(pool.map(_draw, shares, [levels] * len(shares)))
    results = {
        name: _summary([sample for case_samples in drawn for sample in case_samples[name]])
        for name in levels
    }
    for name, result in results.items():
        print(f"{name}: {result} {levels[name]}")
    best = {target: _best(results, target) for target in TARGETS}
    write_report(
        f"skip_search_{cell.name}",
        {
            "cell": asdict(cell),
            "estimators": [estimators for _, estimators in records],
            "gains": recorded.gains.tolist(),
            "drawn": {
                name: {**result, "parameters": asdict(levels[name])}
                for name, result in results.items()
            },
        },
    )
    return {
        target: {**results[name], "parameters": asdict(levels[name])}
        for target, name in best.items()
    }


def _best(results: dict[str, dict[str, float]], target: str) -> str:
    """Return the best candidate of those that save enough, else the one that saves most."""
    own = [name for name in results if name.startswith(target)]
    enough = [name for name in own if results[name]["rows_saved"] >= TARGETS[target] - 0.005]
    if not enough:
        return max(own, key=lambda name: results[name]["rows_saved"])
    return max(enough, key=lambda name: results[name]["psnr_mean_db"])


def _search(recorded: Replay, rng: random.Random, num_candidates: int) -> dict[str, Found]:
    """Return (foretold decibels, parameters) by target, best first: chance, then small changes."""
    tried = [_foretell(recorded, _random_parameters(rng)) for _ in range(num_candidates // 2)]
    for target in TARGETS.values():
        for _ in range(num_candidates // 4):
            parents = _reaching(tried, target)[:8] or [tried[0]]
            tried.append(_foretell(recorded, _changed(rng.choice(parents)[2], rng)))
    return {
        name: [(score, parameters) for _, score, parameters in _reaching(tried, target)]
        for name, target in TARGETS.items()
    }


def _reaching(
    tried: Sequence[tuple[float, float, SkipParameters]], target: float
) -> list[tuple[float, float, SkipParameters]]:
    return sorted(
        (candidate for candidate in tried if candidate[0] >= target),
        key=lambda candidate: -candidate[1],
    )


def _foretell(recorded: Replay, parameters: SkipParameters) -> tuple[float, float, SkipParameters]:
    """Return the rows saved, and the latents' decibels: mean and low end count alike."""
    outcome = replay(recorded, parameters)
    decibels = -20 * np.log10(np.maximum(outcome.errors, 1e-6))
    score = (float(decibels.mean()) + float(np.quantile(decibels, 0.05))) / 2
    return float(outcome.rows_saved.mean()), score, parameters


def _random_parameters(rng: random.Random) -> SkipParameters:
    return SkipParameters(
        warm_up=rng.uniform(0.04, 0.2),
        first_gap=rng.uniform(0.04, 0.24),
        gap_growth=rng.choice([0.0, rng.uniform(0.0, 0.4)]),
        max_gap=rng.uniform(0.1, 0.3),
        max_error=rng.choice([1e9, 10 ** rng.uniform(-2, 0)]),
        slope=rng.uniform(0.4, 0.8),
        decay=rng.uniform(0.0, 0.2),
        max_reach=rng.choice([1.0, 1.5, 2.0]),
    )


def _changed(parameters: SkipParameters, rng: random.Random) -> SkipParameters:
    names = [name for name in asdict(parameters) if rng.random() < 0.4]  # noqa: PLR2004
    return replace(
        parameters, **{name: getattr(parameters, name) * rng.uniform(0.8, 1.25) for name in names}
    )


# --- in the processes -----------------------------------------------------------------------------


def _record(cases: Sequence[Case]) -> tuple[Replay, dict[str, float]]:
    torch.set_num_threads(1)
    family = load_family(EMBEDDED_MODEL, dtype="float32")
    decoder = load_decoder(EMBEDDED_MODEL, dtype="float32")
    trajectories = record(family, decoder, EMBEDDED_MODEL, cases)
    balanced = SKIP_LEVELS["balanced"]
    assert balanced is not None
    steps = np.unique(np.linspace(2, trajectories.num_steps - 1, GAIN_STEPS).round()).astype(int)
    gains = measure_gains(
        family,
        decoder,
        EMBEDDED_MODEL,
        trajectories.first(NUM_GAIN_CASES),
        level=replace(anywhere(balanced), slope=0.0, decay=0.0),
        steps=steps.tolist(),
    )
    return make_replay(trajectories, gains), compare_estimators(trajectories)


def _draw(
    cases: Sequence[Case], levels: dict[str, SkipParameters]
) -> dict[str, list[tuple[float, float]]]:
    """Return (rows saved, PSNR) of each case, by level."""
    torch.set_num_threads(1)
    family = load_family(EMBEDDED_MODEL, dtype="float32")
    decoder = load_decoder(EMBEDDED_MODEL, dtype="float32")
    studio = Studio(family, decoder, EMBEDDED_MODEL, {"off": None, **levels})
    full = studio.decode(
        [picture.latents for picture in studio.denoise([Drawing(case=c) for c in cases])]
    )
    found = {}
    for name in levels:
        finished = studio.denoise([Drawing(case=case, level=name) for case in cases])
        distances = psnr_db(studio.decode([picture.latents for picture in finished]), full).tolist()
        saved = [
            len(picture.skipped_steps) / (2 * case.num_inference_steps)
            for picture, case in zip(finished, cases, strict=True)
        ]
        found[name] = list(zip(saved, distances, strict=True))
    return found


def _summary(samples: Sequence[tuple[float, float]]) -> dict[str, float]:
    saved, distances = zip(*samples, strict=True)
    return {
        "rows_saved": round(statistics.fmean(saved), 4),
        "psnr_mean_db": round(statistics.fmean(distances), 2),
        "psnr_p5_db": round(percentile(distances, 0.05), 2),
    }
