"""`synerdiff bench contention`: a step and decodes side by side, over one after the other."""

from __future__ import annotations

import json
import statistics
from typing import Annotated, Any

import typer

from bench.report import spread, write_report
from bench.side_by_side import Chunks, Forward, Pair, running_pair
from launch.stack import EMBEDDED_MODEL
from services.scheduler.devices.measurements import thread_splits
from shared.settings import available_threads

NUM_CHUNKS = 4
ROWS = 8
DECODES = (1, 2, 3, 4)
"""Decodes beside one step: what several finished requests want at once."""


def _serial_s(pair: Pair, side: int, decodes: int, threads: int) -> float:
    step = pair.forward(Forward(height=side, width=side, rows=ROWS, threads=threads))
    chunks = Chunks(height=side, width=side, num_chunks=decodes * NUM_CHUNKS, threads=threads)
    return step.seconds + pair.chunks(chunks).seconds


def _together_s(pair: Pair, side: int, decodes: int, threads: tuple[int, int]) -> float:
    """Until both sides are done with what the serial run does."""
    step, chunks = pair.together(
        Forward(height=side, width=side, rows=ROWS, threads=threads[0]),
        Chunks(height=side, width=side, num_chunks=decodes * NUM_CHUNKS, threads=threads[1]),
    )
    return max(step.seconds, chunks.seconds)


def run(
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Less certain, under 50 s.")] = False,
) -> dict[str, float]:
    """One UNet step and decodes side by side, over one after the other with all threads.

    A kind is a thread split and a number of decodes beside the step; every repeat takes each kind
    once, next to its serial twin. Returns: `naive_ratio` (the library's default threads and
    waiting on both sides, as people run it), `chosen_ratio` (the best kind; 1.0 where running one
    after the other is best, since that is a kind too). Medians of ratios.
    """
    del seed  # nothing here is random
    num_repeats = 5 if quick else 12
    config = json.loads((EMBEDDED_MODEL / "unet" / "config.json").read_text())
    vae = json.loads((EMBEDDED_MODEL / "vae" / "config.json").read_text())
    side = config["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    threads = available_threads()
    ratios: dict[str, list[float]] = {}
    with (
        running_pair(EMBEDDED_MODEL, num_chunks=NUM_CHUNKS) as pair,
        running_pair(EMBEDDED_MODEL, num_chunks=NUM_CHUNKS, environment={}) as naive_pair,
    ):
        for repeat in range(-1, num_repeats):
            for decodes in DECODES:
                serial_s = _serial_s(pair, side, decodes, threads)
                kinds = {
                    f"{unet}+{vae_threads} threads, {decodes} decodes": _together_s(
                        pair, side, decodes, (unet, vae_threads)
                    )
                    for unet, vae_threads in thread_splits(threads)
                }
                naive_s = _together_s(naive_pair, side, decodes, (0, 0))
                kinds[f"naive, {decodes} decodes"] = naive_s
                if repeat >= 0:  # the first warms up
                    for name, seconds in kinds.items():
                        ratios.setdefault(name, []).append(seconds / serial_s)
    medians = {name: statistics.median(samples) for name, samples in ratios.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.3f}")
    chosen = {name: median for name, median in medians.items() if not name.startswith("naive")}
    best = min(chosen, key=lambda name: chosen[name])
    naive = max(median for name, median in medians.items() if name.startswith("naive"))
    report: dict[str, Any] = {name: spread(samples) for name, samples in ratios.items()}
    write_report("contention", {"rows": ROWS, "kinds": report, "chosen": best})
    return {"naive_ratio": round(naive, 4), "chosen_ratio": round(min(1.0, chosen[best]), 4)}
