"""The compose file on a real engine: up, scaled, wounded, down.

It builds an image and takes minutes, so it runs where SYNERDIFF_TEST_ENGINE=1 asks for it.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from cli.stack import reserve_port

ROOT = Path(__file__).resolve().parents[2]
BUILD_TIMEOUT_S = 900
READY_TIMEOUT_S = 180


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1_500),
    pytest.mark.skipif(
        os.environ.get("SYNERDIFF_TEST_ENGINE") != "1",
        reason="SYNERDIFF_TEST_ENGINE=1 runs it on the Docker engine that is there",
    ),
]


class Project:
    """One compose project of its own name, port and data."""

    def __init__(self) -> None:
        self.port = reserve_port("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": f"synerdiff-test-{os.getpid()}",
            "PORT": str(self.port),
            "SYNERDIFF_IMAGE": "synerdiff-test",
            "VAE_CPUS": "0.5",
            "DOCKER_BUILDKIT": "0",
        }

    def compose(self, *arguments: str) -> str:
        done = subprocess.run(
            ["docker", "compose", *arguments],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def containers(self) -> dict[str, dict[str, str]]:
        lines = self.compose("ps", "--format", "json").splitlines()
        return {item["Name"]: item for item in map(json.loads, lines)}

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=3) as reply:
                    return bool(reply.status == 200)
            except OSError:
                return False

        wait_until(is_ready, READY_TIMEOUT_S, self.compose)

    def metric(self, service: str, name: str) -> dict[str, float]:
        """A metric's value by container of a service."""
        found = {}
        for container, item in self.containers().items():
            if item["Service"] == service:
                code = (
                    "from urllib.request import urlopen;"
                    "print(urlopen('http://127.0.0.1:9100/metrics').read().decode())"
                )
                text = subprocess.run(
                    ["docker", "exec", container, "python", "-c", code],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
                values = [line.split()[-1] for line in text.splitlines() if line.startswith(name)]
                found[container] = sum(map(float, values))
        return found


def wait_until(condition: Callable[[], bool], timeout_s: float, logs: Callable[..., str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, logs("logs", "--tail", "40")
        time.sleep(0.5)


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
    subprocess.run(
        ["docker", "build", "-q", "-f", "deploy/Dockerfile", "-t", "synerdiff-test", "."],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=BUILD_TIMEOUT_S,
    )
    project = Project()
    try:
        project.compose("up", "-d", "--no-build")
        project.wait_ready()
        yield project
    finally:
        project.compose("down", "-v", "--timeout", "10")
    assert not project.containers()


def generate(project: Project, number: int) -> bytes:
    with openai.OpenAI(base_url=f"{project.url}/v1", api_key="unused", max_retries=10) as client:
        reply = client.images.generate(
            prompt="red apple",
            response_format="b64_json",
            extra_body={"seed": number, "num_inference_steps": 4},
        )
    assert reply.data
    return base64.b64decode(reply.data[0].b64_json or "")


def generate_many(project: Project, count: int) -> list[bytes]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: generate(project, number), range(count)))


def test_it_comes_up_healthy_and_latents_travel_through_shared_memory(project: Project) -> None:
    assert generate(project, 1).startswith(b"\x89PNG")
    wait_until(
        lambda: all(
            item["Health"] in {"healthy", ""} and item["State"] == "running"
            for item in project.containers().values()
        ),
        READY_TIMEOUT_S,
        project.compose,
    )
    transfers = project.metric("vae_worker", 'synerdiff_transfers_total{transport="shm"}')
    assert sum(transfers.values()) >= 1


def test_vae_workers_are_scaled_on_their_own(project: Project) -> None:
    project.compose("up", "-d", "--no-build", "--no-recreate", "--scale", "vae_worker=3")
    name = "synerdiff_images_encoded_total"

    def all_have_decoded() -> bool:
        assert all(image.startswith(b"\x89PNG") for image in generate_many(project, 12))
        counts = project.metric("vae_worker", name)
        return len(counts) == 3 and all(count > 0 for count in counts.values())

    wait_until(all_have_decoded, READY_TIMEOUT_S, project.compose)
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(generate_many, project, 20)
        project.compose("up", "-d", "--no-build", "--no-recreate", "--scale", "vae_worker=1")
        assert all(image.startswith(b"\x89PNG") for image in under_way.result())


def test_a_restarted_scheduler_and_a_killed_worker_lose_nothing(project: Project) -> None:
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(generate_many, project, 20)
        project.compose("restart", "scheduler")
        project.compose("kill", "-s", "KILL", "unet_worker")
        project.compose("up", "-d", "--no-build", "--no-recreate")
        assert all(image.startswith(b"\x89PNG") for image in under_way.result())
