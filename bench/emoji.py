"""`synerdiff bench emoji`: does the embedded model draw what its captions say?

Pictures are made by diffusers' own pipeline, so that the figure speaks of the model alone. Each is
compared (L2 of 32x32 RGB) with the small references that lie beside the model; near-duplicate
references count as one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import StableDiffusionPipeline

from training.retrieval import References, load_references, rmse, shrink

MODEL_FOLDER = Path("models/emoji")
REPORT_FILE = Path("reports/emoji.md")
ROWS = 10  # pictures at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture that was made: whose caption it had, and which reference it is nearest to."""

    caption: str
    wanted: int
    nearest: int
    rmse: float
    is_hit: bool


def run(
    *,
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Fewer captions, under 50 s.")] = False,
    model: Annotated[Path, typer.Option(help="A folder with references.")] = MODEL_FOLDER,
    captions: Annotated[
        int | None, typer.Option(min=1, help="How many names; half as many synonyms.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 25,
    guidance_scale: float = 5.0,
    report: Annotated[Path, typer.Option(help="The report to write.")] = REPORT_FILE,
) -> dict[str, float]:
    """Return the share of names, and of synonyms, whose picture is nearest to their own."""
    count = captions or (40 if quick else 200)
    references = load_references(model)
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    groups = references.groups()
    asked = choose_captions(references, count, seed)
    samples = []
    for first in range(0, len(asked), ROWS):
        batch = asked[first : first + ROWS]
        print(f"{first} of {len(asked)} pictures", flush=True)
        pictures = pipeline(
            [caption for _, caption in batch],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(batch))],
        ).images
        small = torch.stack([shrink(picture) for picture in pictures])
        distances = rmse(small, references.pictures)
        for (wanted, caption), nearest, row in zip(
            batch, references.nearest(small), distances, strict=True
        ):
            samples.append(
                Sample(
                    caption=caption,
                    wanted=wanted,
                    nearest=nearest,
                    rmse=row[wanted].item(),
                    is_hit=groups[wanted] == groups[nearest],
                )
            )
    names, synonyms = samples[:count], samples[count:]
    outcome = {
        "retrieval_top1": _share(names),
        "synonym_top1": _share(synonyms),
        "name_rmse_mean": round(sum(sample.rmse for sample in names) / len(names), 4),
        "names": len(names),
        "synonyms": len(synonyms),
        "pictures_known": len(set(groups)),
    }
    settings = f"{steps} steps, guidance {guidance_scale}, seed {seed}, fp32, {model.name}"
    _write_report(report, outcome, samples, references, settings)
    print(f"report: {report}")
    return outcome


def choose_captions(references: References, count: int, seed: int) -> list[tuple[int, str]]:
    """Return (picture, caption): `count` names, then half as many synonyms, drawn by `seed`."""
    rng = random.Random(seed)
    pictures = range(len(references.captions))
    names = rng.sample(pictures, min(count, len(pictures)))
    others = [index for index in pictures if len(references.captions[index]) > 1]
    synonyms = rng.sample(others, min(max(count // 2, 1), len(others)))
    chosen = [(index, references.captions[index][0]) for index in names]
    return chosen + [(index, rng.choice(references.captions[index][1:])) for index in synonyms]


def _share(samples: list[Sample]) -> float:
    """Return the share of hits among `samples`."""
    return round(sum(sample.is_hit for sample in samples) / len(samples), 4)


def _write_report(
    path: Path,
    outcome: dict[str, float],
    samples: list[Sample],
    references: References,
    settings: str,
) -> None:
    """Write the figures, and each miss with what came instead."""
    lines = ["# What the embedded model draws", "", f"Settings: {settings}.", ""]
    lines += ["| figure | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in outcome.items()]
    lines += [
        "",
        "## Misses",
        "",
        "| caption | wanted | nearest | RMSE to wanted |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {sample.caption} | {references.characters[sample.wanted]} "
        f"| {references.characters[sample.nearest]} | {sample.rmse:.3f} |"
        for sample in samples
        if not sample.is_hit
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
