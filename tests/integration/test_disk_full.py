"""A stack whose disk is full pauses, says so, and goes on by itself once there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_up import START_TIMEOUT_S, Up, wait_until

from cli.client import GatewayError, is_ready, request_picture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WAIT_S = 60.0
REQUEST = {"prompt": "red cat", "num_inference_steps": 2}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("mounting is not allowed")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def up(tiny_model_folder: Path, disk: Path, tmp_path: Path) -> Iterator[Up]:
    up = Up.start(tiny_model_folder, disk / "d", said=tmp_path / "said.txt")
    yield up
    up.process.terminate()
    up.process.wait(WAIT_S)


def fill(disk: Path) -> Path:
    path = disk / "filling"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return path


def can_draw(up: Up) -> bool:
    try:
        return bool(request_picture(up.url, REQUEST, lambda _: None).content)
    except GatewayError:
        return False


def test_a_full_disk_is_a_pause(up: Up, disk: Path) -> None:
    up.wait_ready()
    assert can_draw(up)
    before = {child.pid for child in up.children()}
    filling = fill(disk)
    wait_until(lambda: "disk full" in up.said(), WAIT_S, "it does not say that the disk is full")
    assert not can_draw(up)
    wait_until(lambda: not is_ready(up.url), WAIT_S, "it says that it is ready")
    for child in up.children():  # also a service that has to start again meanwhile
        if "services.scheduler" in child.cmdline():
            child.kill()
    assert up.process.poll() is None
    filling.unlink()
    wait_until(lambda: "The disk has room again" in up.said(), WAIT_S, up.said())
    wait_until(lambda: is_ready(up.url), START_TIMEOUT_S, up.said())
    wait_until(lambda: can_draw(up), START_TIMEOUT_S, up.said())
    assert before & {child.pid for child in up.children()}, "nothing has lived through it"
    assert "SIGBUS" not in up.said()
    assert "keeps ending" not in up.said()
