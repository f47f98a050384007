"""From the samples of `bench policies` to its comparisons and its plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.ceiling import ceiling_s
from bench.contenders import EQUAL_SKIP, NAIVE, SYNERDIFF, TUNED, Contender
from bench.policies_cells import Plan, Samples, best_of, next_cells, throughput, throughputs
from bench.report import spread
from services.scheduler.devices.profile import Profile


def summarise(plan: Plan, samples: Samples, profile: Profile) -> dict[str, Any]:
    """The report; its `line` is the benchmark's last one. None stands for what is not measured."""
    line = {
        "naive": _compare(NAIVE, plan, samples),
        "best": _compare(best_of(TUNED, plan, samples), plan, samples),
        "best_equal_skip": _compare(best_of(EQUAL_SKIP, plan, samples), plan, samples),
        "attained_over_ceiling": _attained(plan, samples, profile),
    }
    missing = next_cells(plan, samples, only_missing=True)
    return {
        "line": line,
        "seeds": plan.seeds,
        "requests": plan.num_requests,
        "in_backlog": plan.num_in_backlog,
        "guidance_skip": plan.mix.guidance_skip,
        "num_steps": plan.mix.num_steps,
        "cells_missing": [cell.name for cell in missing],
        "contenders": {one.name: _contender(one, samples) for one in plan.contenders},
    }


def _compare(baseline: Contender, plan: Plan, samples: Samples) -> dict[str, Any]:
    """Synerdiff against a baseline; medians over the seeds.

    Throughputs as if the device had been equally fast around both runs, and as they were.
    """
    ratios, raw_ratios, means, p99s = [], [], [], []
    for seed in plan.seeds:
        ours = samples.get(f"throughput/{seed}/{SYNERDIFF.name}")
        theirs = samples.get(f"throughput/{seed}/{baseline.name}")
        if ours and theirs:
            raw_ratios.append(ours["throughput_per_s"] / theirs["throughput_per_s"])
            ratios.append(raw_ratios[-1] * ours["slowdown"] / theirs["slowdown"])
        if plan.has_loads:
            at = f"at the load of {baseline.name}"
            ours = samples.get(f"latency/{seed}/{SYNERDIFF.name} {at}")
            theirs = samples.get(f"latency/{seed}/{baseline.name} {at}")
        if ours and theirs:
            means.append(1 - ours["mean_s"] / theirs["mean_s"])
            p99s.append(1 - ours["p99_s"] / theirs["p99_s"])
    return {
        "name": baseline.name,
        "throughput_ratio": _median(ratios),
        "raw_throughput_ratio": _median(raw_ratios),
        "mean_latency_reduction": _median(means),
        "p99_latency_reduction": _median(p99s),
    }


def _median(values: Sequence[float]) -> float | None:
    return round(median(values), 4) if values else None


def _attained(plan: Plan, samples: Samples, profile: Profile) -> float | None:
    """Synerdiff's throughput over what the profile allows for the rows and decodes it ran.

    The device's speed right before and after each run counts, as the slowdown since the profile.
    """
    shares = []
    kind = "standing" if plan.num_standing else "throughput"
    for seed in plan.seeds:
        sample = samples.get(f"{kind}/{seed}/{SYNERDIFF.name}")
        if sample:
            least_s = ceiling_s(profile, num_rows=sample["rows_per_picture"], num_decodes=1)
            shares.append(sample["throughput_per_s"] * least_s * sample["slowdown"])
    return _median(shares)


def _contender(one: Contender, samples: Samples) -> dict[str, Any]:
    found: dict[str, Any] = {"throughput_per_s": throughput(one, samples)}
    if rates := throughputs(one, samples):
        found["throughput_spread"] = spread(rates)
    for name, sample in samples.items():
        kind, _, rest = name.split("/", 2)
        if rest.partition(" at the load of ")[0] == one.name and kind != "throughput":
            found[name] = {
                key: value for key, value in sample.items() if key not in {"served", "tried"}
            }
    return found


def plot_loads(samples: Samples, path: Path) -> None:
    """P95 latency over the load, of each contender that carried one, where it was tried."""
    import matplotlib as mpl  # noqa: PLC0415  plots are an extra

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, sample in samples.items():
        if name.startswith("capacity/"):
            points = sorted(
                (one["load_per_s"], one["p95_s"]) for one in sample["tried"] if "p95_s" in one
            )
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=name.split("/", 2)[2])
    axes.set_xlabel("requests a second")
    axes.set_ylabel("P95 latency, s")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
