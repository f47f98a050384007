"""What the compose file and its overlays say, as Compose reads them; no engine is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any

import pytest
from compose_project import ROOT

from shared.settings import (
    GatewaySettings,
    SchedulerSettings,
    UnetWorkerSettings,
    VaeWorkerSettings,
)

SETTINGS = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "unet_worker": UnetWorkerSettings,
    "vae_worker": VaeWorkerSettings,
}
WORKERS = ("unet_worker", "vae_worker")


def has_compose() -> bool:
    if not shutil.which("docker"):
        return False
    asked = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return asked.returncode == 0


pytestmark = pytest.mark.skipif(not has_compose(), reason="no Docker Compose is here")


def read(*overlays: str, **variables: str) -> dict[str, Any]:
    """The services that Compose makes of the files."""
    files = [argument for name in ("compose.yaml", *overlays) for argument in ("-f", name)]
    done = subprocess.run(
        ["docker", "compose", *files, "config", "--format", "json"],
        cwd=ROOT,
        env={name: os.environ[name] for name in ("PATH", "HOME")} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


@pytest.mark.parametrize(
    "overlays", [(), ("deploy/compose.gpu.yaml",), ("deploy/compose.tls.yaml",)]
)
def test_only_settings_that_exist_are_set(overlays: tuple[str, ...]) -> None:
    services = read(*overlays, REDIS_PASSWORD="secret")
    for name, kind in SETTINGS.items():
        ours = [
            variable
            for variable in services[name]["environment"]
            if variable.startswith("SYNERDIFF_")
        ]
        assert {variable.removeprefix("SYNERDIFF_").lower() for variable in ours} <= set(
            kind.model_fields
        )


def test_a_service_may_drain_for_as_long_as_its_settings_say() -> None:
    services = read()
    for name, kind in SETTINGS.items():
        minutes, _, seconds = services[name]["stop_grace_period"].removesuffix("s").rpartition("m")
        grace_s = 60 * int(minutes or 0) + int(seconds)
        assert grace_s > kind.model_fields["drain_timeout_s"].default


def test_on_a_gpu_workers_and_the_mps_daemon_share_namespaces_user_and_device() -> None:
    services = read("deploy/compose.gpu.yaml")
    members = [services[name] for name in (*WORKERS, "mps")]
    for service in members:
        assert service["ipc"] == service["pid"] == "service:anchor"
        assert "user" not in service
        assert service["image"] == services["gateway"]["image"] == services["anchor"]["image"]
        assert service["environment"]["CUDA_MPS_PIPE_DIRECTORY"] == "/mps/pipe"
        assert [volume for volume in service["volumes"] if volume["target"] == "/mps"]
    devices = [member["deploy"]["resources"]["reservations"]["devices"] for member in members]
    assert devices[0] == devices[1] == devices[2]
    assert "deploy" not in services["gateway"]
    for name in WORKERS:
        assert services[name]["environment"]["SYNERDIFF_DEVICE"] == "cuda"
        assert services[name]["depends_on"]["mps"]["condition"] == "service_healthy"


def test_with_tls_everybody_needs_the_password_and_nobody_shows_it() -> None:
    with pytest.raises(AssertionError, match="a password for Redis"):
        read("deploy/compose.tls.yaml")
    services = read("deploy/compose.tls.yaml", REDIS_PASSWORD="secret")
    for name in SETTINGS:
        url = services[name]["environment"]["SYNERDIFF_REDIS_URL"]
        assert url.startswith("rediss://:secret@redis:6379/")
    assert "secret" not in json.dumps(services["redis"]["command"])
