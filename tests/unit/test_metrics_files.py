from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from shared.metrics_files import clear_after

COUNT = "from shared.metrics import HANDLES_LOST, POOL_SLOTS; HANDLES_LOST.inc(3); "
GAUGE = "POOL_SLOTS.labels('free').set(5); "


def run(folder: Path, source: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    process = subprocess.Popen([sys.executable, "-c", source], env=environment)
    assert process.wait() == 0
    return process


def collected(folder: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    return {
        sample.name: sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name in {"synerdiff_handles_lost_total", "synerdiff_pool_slots"}
    }


def test_every_page_of_a_metrics_file_is_there_before_it_is_written(tmp_path: Path) -> None:
    run(tmp_path, COUNT + GAUGE)
    files = list(tmp_path.iterdir())
    assert len(files) == 4
    for file in files:
        assert file.stat().st_blocks * 512 >= file.stat().st_size > 0


@pytest.mark.parametrize(
    "limit",
    ["", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)); "],
    ids=["no folder", "no room"],
)
def test_without_room_a_process_keeps_its_metrics_to_itself(tmp_path: Path, limit: str) -> None:
    folder = tmp_path if limit else tmp_path / "nowhere"
    show = "from shared.metrics import render_metrics; assert render_metrics()"
    run(folder, limit + COUNT + GAUGE + show)
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_process_has_counted_stays_and_what_it_was_at_goes(tmp_path: Path) -> None:
    process = run(tmp_path, COUNT + GAUGE)
    both = {"synerdiff_handles_lost_total": 3.0, "synerdiff_pool_slots": 5.0}
    assert collected(tmp_path) == both
    before = sum(file.stat().st_size for file in tmp_path.iterdir())
    clear_after(process.pid, tmp_path)
    assert collected(tmp_path) == {"synerdiff_handles_lost_total": 3.0}
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < before / 4
