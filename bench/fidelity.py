"""`synerdiff bench fidelity`: what skipped guidance does to the pictures, and what it saves.

Every picture is compared with the fully guided one of the same seed. Two baselines save as many
rows of the same request: one drops guidance in its last steps, the other skips at random steps
(behind the first two), with the level's own extrapolation. The references of even number are there
to tune the levels on, those of odd number are reported.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.drawing import Case
from bench.fidelity_samples import (
    LEVELS,
    Sample,
    fingerprint,
    measure_cases,
    start_process,
)
from bench.fidelity_sheet import save_sheet
from bench.report import REPORTS, machine, percentile, write_report
from launch.stack import EMBEDDED_MODEL
from shared.settings import available_threads
from training.retrieval import References, load_references

SAMPLES = REPORTS / "fidelity"
SHEET = Path("docs/fidelity.png")
CASES_AT_ONCE = 10  # three drawings of each share a forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Requests of one kind."""

    num_prompts: int = 16
    """Each with `num_seeds` seeds."""
    num_seeds: int = 1
    sampler: str = "ddim"
    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    baseline_every: int = 0
    """So many cases have one that is drawn by the baselines, too; 0 for none."""

    @property
    def name(self) -> str:
        """Return the name of the cell's file of samples."""
        return f"{self.sampler}-{self.num_inference_steps}-steps-guidance-{self.guidance_scale:g}"

    def cases(self, references: References, *, half: int, seed: int) -> list[Case]:
        """Return its requests, on the references of that half; as many seeds after one another."""
        return [
            Case(
                caption=caption,
                picture=picture,
                seed=seed + 1000 * turn + number,
                sampler=self.sampler,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
            )
            for turn in range(self.num_seeds)
            for number, (picture, caption) in enumerate(
                choose_prompts(references, self.num_prompts, half=half)
            )
        ]


CELLS = (
    Cell(num_prompts=300, num_seeds=2, baseline_every=4),
    *(Cell(num_inference_steps=steps) for steps in (4, 8, 12, 16, 50)),
    *(Cell(guidance_scale=scale) for scale in (2.0, 3.0, 8.0, 12.0)),
    *(Cell(sampler=name) for name in ("euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras")),
    Cell(sampler="dpmpp_2m", num_inference_steps=12),
)
"""The first is the one whose figures are claimed."""

QUICK = Cell(num_prompts=14, baseline_every=1)


def choose_prompts(references: References, count: int, *, half: int) -> list[tuple[int, str]]:
    """Return (picture, caption) of one half: its names, evenly spread, then first synonyms."""
    pictures = range(half, len(references.captions), 2)
    prompts = [
        (picture, references.captions[picture][turn])
        for turn in range(max(map(len, references.captions)))
        for picture in pictures
        if turn < len(references.captions[picture])
    ]
    spread = max(len(pictures) // count, 1)
    return prompts[: spread * count : spread]


def run(
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Less certain, under 50 s.")] = False,
    cell: Annotated[int | None, typer.Option(help="Measure one cell again.")] = None,
) -> Mapping[str, Any]:
    """Return what skipped guidance saves, and how far its pictures are from full guidance's.

    Returns, for `balanced` and `fast`: `rows_saved`, of all rows of the fully guided run;
    `psnr_mean_db`, `psnr_p5_db`, `foreground_psnr_mean_db`, `ssim_mean`; `retrieval_delta`, the
    change of the share of pictures that are nearest to the reference they name; `over_drop_db` and
    `over_random_db`, the mean PSNR above that of the two baselines. The full form goes on where it
    was interrupted, as long as the model and the levels are the same.
    """
    references = load_references(EMBEDDED_MODEL)
    num_processes = available_threads()
    with ProcessPoolExecutor(
        num_processes, mp_context=get_context("spawn"), initializer=start_process
    ) as pool:
        if quick:
            cases = QUICK.cases(references, half=1, seed=seed)
            samples = list(_measure(pool, QUICK, cases))
            summary = summarise(samples)
            write_report("fidelity_quick", {"cell": asdict(QUICK), "summary": summary})
            return _last_line(summary)
        for number, entry in enumerate(CELLS):
            _complete(pool, entry, references, seed=seed, is_new=number == cell)
    cells = [(entry, _read(_path(entry))[1]) for entry in CELLS]
    summaries = [{**asdict(entry), "summary": summarise(samples)} for entry, samples in cells]
    write_report("fidelity", {"cells": summaries})
    save_sheet(CELLS[0].cases(references, half=1, seed=seed), SHEET)
    for line in summaries:
        print(json.dumps(line))
    return _last_line(summarise(cells[0][1]))


def summarise(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Return the figures of each way to draw, over all samples that have it.

    below_level_db: how much nearer to full guidance a baseline's level is, on the same requests.
    """
    summary: dict[str, dict[str, float]] = {}
    for arm in dict.fromkeys(arm for sample in samples for arm in sample["arms"]):
        found = [sample["arms"][arm] for sample in samples if arm in sample["arms"]]
        full = [sample["arms"]["full"]["is_hit"] for sample in samples if arm in sample["arms"]]
        figures = {
            "pictures": len(found),
            "retrieval": statistics.fmean(m["is_hit"] for m in found),
        }
        if arm != "full":
            psnr = [sample["psnr_db"] for sample in found]
            figures |= {
                "rows_saved": statistics.fmean(sample["rows_saved"] for sample in found),
                "psnr_mean_db": statistics.fmean(psnr),
                "psnr_p5_db": percentile(psnr, 0.05),
                "foreground_psnr_mean_db": statistics.fmean(m["foreground_db"] for m in found),
                "ssim_mean": statistics.fmean(sample["ssim"] for sample in found),
                "gmsd_mean": statistics.fmean(sample["gmsd"] for sample in found),
                "retrieval_delta": figures["retrieval"] - statistics.fmean(full),
            }
        level = arm.partition("_")[0]
        if level != arm:
            levels = [sample["arms"][level] for sample in samples if arm in sample["arms"]]
            figures["below_level_db"] = statistics.fmean(
                same_level["psnr_db"] - other["psnr_db"]
                for same_level, other in zip(levels, found, strict=True)
            )
        summary[arm] = {name: round(value, 4) for name, value in figures.items()}
    return summary


def _last_line(summary: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    line = {}
    for level in LEVELS:
        figures = {k: v for k, v in summary[level].items() if k not in {"pictures", "retrieval"}}
        for baseline in ("drop", "random"):
            figures[f"over_{baseline}_db"] = summary[f"{level}_{baseline}"]["below_level_db"]
        line[level] = figures
    return line


# --- samples --------------------------------------------------------------------------------------


def _measure(pool: ProcessPoolExecutor, cell: Cell, cases: Sequence[Case]) -> Any:
    """Yield samples as they are done."""
    groups = [cases[first : first + CASES_AT_ONCE] for first in range(0, len(cases), CASES_AT_ONCE)]
    every = cell.baseline_every
    tasks = [pool.submit(measure_cases, group, group[::every] if every else ()) for group in groups]
    for done, task in enumerate(as_completed(tasks), start=1):
        yield from task.result()
        print(f"{cell.name}: {done} of {len(tasks)} batches", flush=True)


def _complete(
    pool: ProcessPoolExecutor, cell: Cell, references: References, *, seed: int, is_new: bool
) -> None:
    """Measure what is missing in the cell's file, or all of it."""
    path = _path(cell)
    cases = cell.cases(references, half=1, seed=seed)
    header = {"fingerprint": fingerprint(), "cell": asdict(cell), "seed": seed}
    known, samples = _read(path)
    if is_new or known != header:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n")
        samples = []
    done = {(sample["case"]["caption"], sample["case"]["seed"]) for sample in samples}
    missing = [case for case in cases if (case.caption, case.seed) not in done]
    commit = machine()["commit"]
    with path.open("a") as file:
        for sample in _measure(pool, cell, missing):
            file.write(json.dumps({**sample, "commit": commit}) + "\n")
            file.flush()


def _path(cell: Cell) -> Path:
    return SAMPLES / f"{cell.name}.jsonl"


def _read(path: Path) -> tuple[dict[str, Any], list[Sample]]:
    """Return a cell's header and samples; a line that was cut short is left out."""
    if not path.exists():
        return {}, []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    header, *samples = map(json.loads, lines)
    return header, samples
