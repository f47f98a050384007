"""The Kubernetes manifests: against the API's own schemas, and against what the services do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from shared import metrics
from shared.settings import (
    GatewaySettings,
    SchedulerSettings,
    ServiceSettings,
    UnetWorkerSettings,
    VaeWorkerSettings,
)

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
BUILDERS = (("kustomize", "build"), ("kubectl", "kustomize"))
SETTINGS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "unet-worker": UnetWorkerSettings,
    "vae-worker": VaeWorkerSettings,
}
Manifest = dict[str, Any]


def load(text: str) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def build(overlay: str) -> list[Manifest]:
    command = next((builder for builder in BUILDERS if shutil.which(builder[0])), None)
    if command is None:
        pytest.skip("neither kustomize nor kubectl is here")
    done = subprocess.run(
        [*command, str(FOLDER / "overlays" / overlay)], capture_output=True, text=True, check=True
    )
    return load(done.stdout)


@pytest.fixture(params=["cpu", "gpu"])
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """Everything that an overlay applies."""
    return build(request.param)


def of_kind(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {
        manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == kind
    }


def container(deployment: Manifest) -> Manifest:
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return found


def check_schema(manifest: Manifest) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("path", sorted((FOLDER / "base").glob("*.yaml")), ids=lambda p: p.name)
def test_every_manifest_fits_its_schema(path: Path) -> None:
    for manifest in load(path.read_text()):
        if manifest["kind"] != "Kustomization":
            check_schema(manifest)


def test_the_schemas_are_strict() -> None:
    (deployment, _) = load((FOLDER / "base" / "vae-worker.yaml").read_text())
    deployment["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(deployment)


def test_what_an_overlay_applies_fits_its_schemas_in_one_namespace(
    manifests: list[Manifest],
) -> None:
    for manifest in manifests:
        if manifest["kind"] != "ScaledObject":  # no part of Kubernetes; looked at below
            check_schema(manifest)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "synerdiff"


def test_every_service_has_probes_a_budget_and_time_to_drain(manifests: list[Manifest]) -> None:
    deployments = of_kind(manifests, "Deployment")
    assert set(deployments) == set(SETTINGS)
    budgets = of_kind(manifests, "PodDisruptionBudget")
    for name, deployment in deployments.items():
        template = deployment["spec"]["template"]
        assert budgets[name]["spec"]["selector"] == deployment["spec"]["selector"]
        assert container(deployment)["readinessProbe"]["httpGet"]["path"] == "/readyz"
        assert "startupProbe" in container(deployment)
        variables = {
            variable["name"]: variable.get("value") for variable in container(deployment)["env"]
        }
        default = SETTINGS[name].model_fields["drain_timeout_s"].default
        drain_s = float(variables.get("SYNERDIFF_DRAIN_TIMEOUT_S") or default)
        assert template["spec"]["terminationGracePeriodSeconds"] > drain_s


def test_only_settings_that_exist_are_set(manifests: list[Manifest]) -> None:
    (shared,) = of_kind(manifests, "ConfigMap").values()
    known = set().union(*(kind.model_fields for kind in SETTINGS.values()))
    assert {_field(name) for name in shared["data"]} <= known
    for name, deployment in of_kind(manifests, "Deployment").items():
        own = {_field(variable["name"]) for variable in container(deployment)["env"]}
        assert own <= set(SETTINGS[name].model_fields)


def _field(variable: str) -> str:
    assert variable.startswith("SYNERDIFF_")
    return variable.removeprefix("SYNERDIFF_").lower()


def test_each_pool_of_workers_scales_with_its_own_backlog(manifests: list[Manifest]) -> None:
    scaled = of_kind(manifests, "ScaledObject")
    deployments, services = of_kind(manifests, "Deployment"), of_kind(manifests, "Service")
    assert set(scaled) == {"unet-worker", "vae-worker"}
    for name, manifest in scaled.items():
        spec = manifest["spec"]
        assert spec["scaleTargetRef"]["name"] in deployments
        assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
        (trigger,) = spec["triggers"]
        assert float(trigger["metadata"]["targetValue"]) > 0
        address = urlsplit(trigger["metadata"]["url"])
        service, namespace = (address.hostname or "").split(".")[:2]
        assert namespace == services[service]["metadata"]["namespace"]
        assert address.port == services[service]["spec"]["ports"][0]["port"]
        where = re.fullmatch(r'(\w+)\{pool="(\w+)"\}', trigger["metadata"]["valueLocation"])
        assert where
        assert where[2] == name.removesuffix("-worker")
        metrics.BACKLOG.labels(pool=where[2]).set(3)
        shown = metrics.render_metrics()[0].decode()
        assert f"{trigger['metadata']['valueLocation']} 3.0" in shown


def test_the_gpu_overlay_gives_each_worker_a_gpu_and_nobody_else() -> None:
    for name, deployment in of_kind(build("gpu"), "Deployment").items():
        has_gpu = "nvidia.com/gpu" in container(deployment)["resources"]["limits"]
        assert has_gpu == name.endswith("-worker")
