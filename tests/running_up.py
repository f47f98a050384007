"""A running `synerdiff up`, as tests start and look at it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from cli.stack import reserve_port

START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 60.0
PROCESSES = 5


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@dataclass(slots=True)
class Up:
    """A running `synerdiff up`."""

    model: Path
    data_dir: Path
    port: int
    output: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, model: Path, data_dir: Path, *more: str, said: Path | None = None) -> Up:
        """said: the file for what it says; beside the data by default."""
        port = reserve_port("127.0.0.1", 0)
        output = said or data_dir.with_suffix(f".{port}.txt")
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*command(model, data_dir), "--port", str(port), *more], stdout=file, stderr=file
            )
        return cls(model=model, data_dir=data_dir, port=port, output=output, process=process)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def said(self) -> str:
        return self.output.read_text()

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.said()
            return f"SynerDiff is ready: {self.url}" in self.said()

        wait_until(is_ready, START_TIMEOUT_S, "the stack did not come up")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def segments(self) -> set[Path]:
        """Files in shared memory that our processes have mapped."""
        return {
            Path(mapping.path)
            for child in self.children()
            for mapping in child.memory_maps()
            if mapping.path.startswith("/dev/shm/synerdiff-")
        }


def command(model: Path, data_dir: Path) -> list[str]:
    options = ["--model", str(model), "--data-dir", str(data_dir)]
    return [sys.executable, "-m", "cli", "up", *options]


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
