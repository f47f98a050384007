"""The whole stack on a tiny model, started as a user starts it."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from PIL import Image
from running_up import PROCESSES, START_TIMEOUT_S, STOP_TIMEOUT_S, Up, command, is_gone, wait_until
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[[], Up]]:
    started: list[Up] = []

    def start_one() -> Up:
        started.append(Up.start(model, tmp_path / "d"))
        return started[-1]

    yield start_one
    for up in started:
        up.process.kill()
        up.process.wait()


def request_images(up: Up, num_images: int) -> list[Image.Image]:
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key="unused") as client:
        reply = client.images.generate(
            prompt="red cat",
            n=num_images,
            response_format="b64_json",
            extra_body={"num_inference_steps": 3, "seed": 1},
        )
    assert reply.data
    contents = [base64.b64decode(image.b64_json or "") for image in reply.data]
    return [Image.open(io.BytesIO(content)) for content in contents]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stack_serves_survives_the_death_of_its_parts_and_leaves_nothing_behind(
    start: Callable[[], Up], tmp_path: Path
) -> None:
    # Killed in the middle of its start, it takes its services along ...
    up = start()
    wait_until(lambda: len(up.children()) == PROCESSES, START_TIMEOUT_S, up.said())
    children = up.children()
    up.process.kill()
    up.process.wait()
    wait_until(lambda: all(is_gone(child) for child in children), STOP_TIMEOUT_S, "outlived it")

    # ... and can be started again at once, where it was.
    up = start()
    up.wait_ready()
    assert [image.size for image in request_images(up, 2)] == [(64, 64)] * 2

    second = subprocess.run(
        [*command(up.model, up.data_dir), "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 1
    assert f"process {up.process.pid} ({up.url})" in second.stderr

    vae = next(child for child in up.children() if "services.vae_worker" in child.cmdline())
    vae.kill()
    path = tmp_path / "cat.webp"
    generate = ["generate", "cat", "-o", str(path), "--steps", "2", "--url", up.url]
    subprocess.run([sys.executable, "-m", "cli", *generate], check=True, capture_output=True)
    with Image.open(path) as image:
        assert image.format == "WEBP"
    assert "vae-0      ended (killed by SIGKILL)" in up.said()

    children, segments = up.children(), up.segments()
    assert len(children) == PROCESSES
    assert len(segments) == 1
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(STOP_TIMEOUT_S) == 0, up.said()
    assert "SynerDiff has stopped" in up.said()
    assert "Traceback" not in up.said()
    assert all(is_gone(child) for child in children)
    assert not any(segment.exists() for segment in segments)
    assert not (up.data_dir / "redis.sock").exists()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", up.port))
    assert os.access(up.data_dir / "logs" / "gateway.log", os.R_OK)
