"""Reports under `reports/`, the last line of JSON, and the statistics they hold."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

REPORTS = Path("reports")


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return median and range of repeated measurements; at least one."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": len(samples),
    }


def percentile(samples: Sequence[float], fraction: float) -> float:
    """Return the sample below which that fraction of the others lies (nearest rank)."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, round(fraction * len(ordered) + 0.5) - 1))]


def write_report(name: str, report: Mapping[str, Any]) -> Path:
    """Write `reports/NAME.json`, with the machine and commit it was taken at; return its path."""
    REPORTS.mkdir(exist_ok=True)
    path = REPORTS / f"{name}.json"
    path.write_text(json.dumps({**report, "measured_on": machine()}, indent=2) + "\n")
    return path


def machine() -> dict[str, Any]:
    """Return the machine and the commit that a figure was taken at."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - whichever git is there
        capture_output=True,
        text=True,
        check=False,
    )
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
