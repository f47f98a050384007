"""A compose project of its own name, port and data, as tests drive it."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from launch.stack import reserve_port

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "synerdiff-test"
BUILD_TIMEOUT_S = 900
COMMAND_TIMEOUT_S = 240
READY_TIMEOUT_S = 180
SHOW_METRICS = (
    "from urllib.request import urlopen;"
    "print(urlopen('http://127.0.0.1:9100/metrics').read().decode())"
)


def has_engine() -> bool:
    """Whether `docker compose` works here."""
    if not shutil.which("docker"):
        return False
    asked = (["docker", "info"], ["docker", "compose", "version"])
    return all(
        subprocess.run(question, capture_output=True, check=False).returncode == 0
        for question in asked
    )


needs_engine = pytest.mark.skipif(
    not has_engine() and os.environ.get("SYNERDIFF_REQUIRE_ENGINE") != "1",
    reason="no Docker engine with Compose is here",
)
"""Where SYNERDIFF_REQUIRE_ENGINE=1 says that there has to be one, its lack is a failure."""


def run(*command: str, timeout_s: float = COMMAND_TIMEOUT_S, **variables: str) -> str:
    """A command's output; its failure, with all it said, is the test's."""
    # The classic builder is the one that every engine has.
    environment = {**os.environ, "DOCKER_BUILDKIT": "0", **variables}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def build_image() -> None:
    """The image that the projects run; quick but for the first time."""
    run(
        *("docker", "build", "-q", "-f", "deploy/Dockerfile", "-t", IMAGE, "."),
        timeout_s=BUILD_TIMEOUT_S,
    )


def assert_same_picture(picture: bytes, other: bytes) -> None:
    """Up to rounding: neighbours and thread counts change the order of sums."""
    pixels = [
        np.asarray(Image.open(io.BytesIO(data)), dtype=np.float32) for data in (picture, other)
    ]
    assert np.abs(pixels[0] - pixels[1]).mean() < 2


class Project:
    """overlays: files beside compose.yaml. variables: for Compose to put into them."""

    def __init__(self, name: str, *overlays: str, **variables: str) -> None:
        self.name = f"synerdiff-{name}-{os.getpid()}"
        self.port = reserve_port("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.port}"
        files = ("compose.yaml", *overlays)
        self._command = ("docker", "compose", *(part for file in files for part in ("-f", file)))
        self._variables = variables

    def compose(self, *arguments: str) -> str:
        return run(
            *(*self._command, *arguments),
            COMPOSE_PROJECT_NAME=self.name,
            PORT=str(self.port),
            SYNERDIFF_IMAGE=IMAGE,
            **self._variables,
        )

    def down(self) -> None:
        """Stop it; nothing of it is left."""
        self.compose("down", "-v", "--timeout", "20")
        assert not self.leftovers()

    def up(self, *arguments: str) -> None:
        self.compose("up", "-d", "--no-build", "--no-recreate", *arguments)

    def containers(self, service: str = "") -> dict[str, dict[str, str]]:
        """What `docker compose ps` says of each running container, by its name."""
        lines = self.compose("ps", "--format", "json").splitlines()
        items = {item["Name"]: item for item in map(json.loads, lines)}
        return {name: item for name, item in items.items() if service in {"", item["Service"]}}

    def leftovers(self) -> list[str]:
        """Containers, volumes and networks of this project, running or not."""
        kinds = (("ps", "-a"), ("volume", "ls"), ("network", "ls"))
        label = f"label=com.docker.compose.project={self.name}"
        found = [run("docker", *kind, "-q", "--filter", label) for kind in kinds]
        return [line for text in found for line in text.splitlines()]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}\n{self.compose('logs', '--tail', '30')}")
            time.sleep(0.5)

    def wait_healthy(self) -> None:
        def is_healthy() -> bool:
            items = self.containers().values()
            return all(
                item["State"] == "running" and item["Health"] in {"healthy", ""} for item in items
            )

        self.wait_until(is_healthy, "not every container is healthy")

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=3) as reply:
                    return bool(reply.status == 200)
            except OSError:
                return False

        self.wait_until(is_ready, "the gateway is not ready")

    def metric(self, container: str, name: str) -> Counter[str]:
        """The samples of a container's metric by their labels, as `{name="value"}`."""
        text = run("docker", "exec", container, "python", "-c", SHOW_METRICS)
        samples = Counter[str]()
        for line in text.splitlines():
            if line.startswith(name):
                sample, value = line.rsplit(maxsplit=1)
                samples[sample.removeprefix(name)] += round(float(value))
        return samples

    def restarted_requests(self) -> int:
        """Requests that needed another attempt so far, as this scheduler has counted them."""
        (scheduler,) = self.containers("scheduler")
        return self.metric(scheduler, "synerdiff_redeliveries_total").total()

    # --- load -----------------------------------------------------------------------------------

    def generate(self, seed: int, *, steps: int = 4) -> bytes:
        """A picture, by the official client as it comes but for its patience."""
        with openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="unused", max_retries=10, timeout=READY_TIMEOUT_S
        ) as client:
            reply = client.images.generate(
                prompt="red apple",
                response_format="b64_json",
                extra_body={"seed": seed, "num_inference_steps": steps},
            )
        assert reply.data
        return base64.b64decode(reply.data[0].b64_json or "")

    def generate_many(self, count: int, *, steps: int = 4) -> list[bytes]:
        """Pictures of the seeds from 0 on, all asked for at once; every one of them a picture."""
        with ThreadPoolExecutor(count) as threads:
            images = list(threads.map(lambda seed: self.generate(seed, steps=steps), range(count)))
        assert all(image.startswith(b"\x89PNG") for image in images)
        return images
