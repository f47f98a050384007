"""`synerdiff bench transport`: latents between processes, by shared memory or through Redis.

First how long it takes (`transport_latency`), then whether anything is torn or left behind when
either side is killed at any moment (`transport_kills`). Both run real processes and a real server.
"""

from __future__ import annotations

from typing import Annotated

import typer

from bench.report import write_report
from bench.server import private_server
from bench.transport_kills import hand_over_under_fire
from bench.transport_latency import measure_latency


def run(
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Fewer hand-overs, under 50 s.")] = False,
) -> dict[str, float]:
    """Return how long small and large latents take, and what comes of it while processes die.

    `shm_large_ms` and its like are medians from before the copy in to after the copy out (128 KiB
    and 4 MiB); `corrupted` counts tensors that are not what was published; `leaked` counts slots,
    files and mappings that did not come back.
    """
    with private_server() as url:
        latency = measure_latency(url, seed=seed, num_rounds=30 if quick else 400)
        kills = hand_over_under_fire(
            url,
            seed=seed,
            num_hand_overs=5_000 if quick else 100_000,
            num_kills=10 if quick else 100,
        )
    write_report("transport", {"seed": seed, "quick": quick, "latency": latency, "kills": kills})
    medians = {f"{name}_ms": figures["median_ms"] for name, figures in latency.items()}
    order = ("shm_large_ms", "inline_large_ms", "shm_small_ms", "inline_small_ms")
    return {
        **{name: medians[name] for name in order},
        "corrupted": kills["corrupted"],
        "leaked": kills["leaked"],
    }
