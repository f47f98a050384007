"""`synerdiff bench emoji`: does the embedded model draw what its captions say?

Pictures are made by diffusers' own pipeline, so that the figures speak of the model alone. Each is
compared (L2 of 32x32 RGB) with the small references that lie beside the model; near-duplicate
references count as one. Sharpness is how steep the edges of the names' pictures are, over how steep
the font's own are, wherever the font has one (`training.edges`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import StableDiffusionPipeline
from torch import Tensor

from training.edges import edge_sharpness_ratio, edge_steepness, load_edges
from training.emoji_set import character_forms
from training.retrieval import References, load_references, rmse, shrink

MODEL_FOLDER = Path("models/emoji")
REPORT_FILE = Path("reports/emoji.md")
ROWS = 10  # pictures at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A caption, and the number of the picture that it stands for."""

    caption: str
    wanted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What the model is asked for."""

    names: tuple[Question, ...]
    synonyms: tuple[Question, ...]
    characters: tuple[Question, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture that was made."""

    question: Question
    nearest: int
    """The reference that it is nearest to."""
    rmse: float
    """Its distance to the reference that was wanted."""
    is_hit: bool
    """Whether the nearest is the wanted one or a near-duplicate."""
    steepness: Tensor
    """Of its edges, by window."""


def run(
    *,
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Fewer captions, under 50 s.")] = False,
    model: Annotated[Path, typer.Option(help="A folder with references.")] = MODEL_FOLDER,
    captions: Annotated[
        int | None,
        typer.Option(min=1, help="How many names, and how many emoji; half as many synonyms."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 25,
    guidance_scale: float = 5.0,
    report: Annotated[Path, typer.Option(help="The report to write.")] = REPORT_FILE,
) -> dict[str, float]:
    """Return how many captions give the picture they stand for, how near to it, how sharp."""
    count = captions or (40 if quick else 200)
    references = load_references(model)
    questions = choose_questions(references, count, seed, all_forms=not quick)
    samples = _draw(
        [*questions.names, *questions.synonyms, *questions.characters],
        references,
        _load_pipeline(model),
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
    )
    names = [next(samples) for _ in questions.names]
    synonyms = [next(samples) for _ in questions.synonyms]
    characters = [next(samples) for _ in questions.characters]
    font_edges = load_edges(model, len(references.captions))
    outcome = {
        "retrieval_top1": _share(names),
        "synonym_top1": _share(synonyms),
        "retrieval_top1_by_character": _share(characters),
        "name_rmse": round(fmean(sample.rmse for sample in names), 4),
        "edge_sharpness_ratio": round(
            edge_sharpness_ratio(
                torch.stack([sample.steepness for sample in names]),
                font_edges[[sample.question.wanted for sample in names]],
            ),
            4,
        ),
        "names": len(names),
        "synonyms": len(synonyms),
        "characters": len(characters),
        "pictures_known": len(set(references.groups())),
    }
    settings = f"{steps} steps, guidance {guidance_scale}, seed {seed}, fp32, {model.name}"
    _write_report(report, outcome, [*names, *synonyms, *characters], references, settings)
    print(f"report: {report}")
    return outcome


def choose_questions(
    references: References, count: int, seed: int, *, all_forms: bool
) -> Questions:
    """Return `count` names, half as many synonyms, and `count` emoji, drawn by `seed`.

    An emoji is asked for in one form, with or without its variation selector, or in all of them.
    """
    rng = random.Random(seed)
    pictures = range(len(references.captions))
    names = rng.sample(pictures, min(count, len(pictures)))
    others = [index for index in pictures if len(references.captions[index]) > 1]
    synonyms = rng.sample(others, min(max(count // 2, 1), len(others)))
    by_synonym = tuple(
        Question(caption=rng.choice(references.captions[index][1:]), wanted=index)
        for index in synonyms
    )
    characters = [
        (index, character_forms(references.characters[index]))
        for index in rng.sample(pictures, min(count, len(pictures)))
    ]
    return Questions(
        names=tuple(Question(caption=references.captions[i][0], wanted=i) for i in names),
        synonyms=by_synonym,
        characters=tuple(
            Question(caption=form, wanted=index)
            for index, forms in characters
            for form in (forms if all_forms else [rng.choice(forms)])
        ),
    )


def _load_pipeline(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def _draw(
    questions: list[Question],
    references: References,
    pipeline: StableDiffusionPipeline,
    *,
    seed: int,
    steps: int,
    guidance_scale: float,
) -> Iterator[Sample]:
    """Yield the sample of each question, in order."""
    groups = references.groups()
    for first in range(0, len(questions), ROWS):
        batch = questions[first : first + ROWS]
        print(f"{first} of {len(questions)} pictures", flush=True)
        pictures = pipeline(
            [question.caption for question in batch],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(batch))],
        ).images
        small = torch.stack([shrink(picture) for picture in pictures])
        whole = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        steepness = edge_steepness(whole.permute(0, 3, 1, 2).float() / 255)
        distances = rmse(small, references.pictures)
        for question, nearest, row, edges in zip(
            batch, references.nearest(small), distances, steepness, strict=True
        ):
            yield Sample(
                question=question,
                nearest=nearest,
                rmse=row[question.wanted].item(),
                is_hit=groups[question.wanted] == groups[nearest],
                steepness=edges,
            )


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
        f"| {sample.question.caption} | {references.characters[sample.question.wanted]} "
        f"| {references.characters[sample.nearest]} | {sample.rmse:.3f} |"
        for sample in samples
        if not sample.is_hit
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
