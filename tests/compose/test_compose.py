"""The compose file on a real engine: up, scaled, restarted, wounded, down.

It builds an image and takes minutes. It runs wherever `docker compose` works; where
SYNERDIFF_REQUIRE_ENGINE=1 says that it has to, a missing engine is a failure.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from compose_project import Project, assert_same_picture, build_image, needs_engine, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_200), needs_engine]

ENCODED = "synerdiff_images_encoded_total"
TRANSFERS = "synerdiff_transfers_total"
VAE_CPUS = "0.2"
NUM_TIMED = 30


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    build_image()
    project = Project("test")
    try:
        project.up()
        project.wait_healthy()
        project.wait_ready()
        yield project
    finally:
        project.down()


def limit_cpus(project: Project, service: str, cpus: str) -> None:
    run("docker", "update", "--cpus", cpus, *project.containers(service))


def wait_until_denoising(project: Project) -> None:
    (scheduler,) = project.containers("scheduler")
    name = 'synerdiff_requests{state="denoising"}'
    project.wait_until(lambda: project.metric(scheduler, name).total() > 0, "nothing is denoised")


def pictures_per_s(project: Project, vae_workers: int) -> float:
    """With so many decoders of a fifth of a CPU each, the slow part of pictures of one step."""
    project.up("--scale", f"vae_worker={vae_workers}")
    project.wait_healthy()
    limit_cpus(project, "vae_worker", VAE_CPUS)
    began = time.monotonic()
    project.generate_many(NUM_TIMED, steps=1)
    return NUM_TIMED / (time.monotonic() - began)


def test_pictures_come_and_their_latents_travel_through_shared_memory(project: Project) -> None:
    assert project.generate(1).startswith(b"\x89PNG")
    (vae,) = project.containers("vae_worker")
    assert project.metric(vae, TRANSFERS) == Counter({'{transport="shm"}': 1})


def test_nothing_runs_as_root_but_the_database(project: Project) -> None:
    for name, item in project.containers().items():
        if item["Service"] != "redis":
            assert run("docker", "exec", name, "id", "-u").strip() == "10001"


def test_vae_workers_are_scaled_on_their_own(project: Project) -> None:
    """Three of them decode faster than one, and then two leave unnoticed."""
    rates = {count: pictures_per_s(project, count) for count in (1, 2, 3)}
    print("pictures per second by decoders:", rates)  # noqa: T201 (`pytest -rP` shows it)
    decoded = [project.metric(name, ENCODED).total() for name in project.containers("vae_worker")]
    assert len(decoded) == 3
    assert all(count > 0 for count in decoded), decoded
    assert rates[3] > rates[1]
    with ThreadPoolExecutor(1) as thread:
        under_way = thread.submit(project.generate_many, 30)
        project.up("--scale", "vae_worker=1")
        under_way.result()
    assert len(project.containers("vae_worker")) == 1
    assert project.restarted_requests() == 0


def test_a_unet_worker_is_restarted_under_load_and_goes_on_where_it_was(project: Project) -> None:
    alone = project.generate(0, steps=50)
    with ThreadPoolExecutor(1) as thread:
        under_way = thread.submit(project.generate_many, 12, steps=50)
        wait_until_denoising(project)
        project.compose("restart", "unet_worker")
        images = under_way.result()
    assert_same_picture(images[0], alone)
    (unet,) = project.containers("unet_worker")
    assert project.metric(unet, "synerdiff_resumed_total").total() > 0
    assert project.restarted_requests() == 0


@pytest.mark.parametrize("service", ["scheduler", "vae_worker", "gateway"])
def test_a_service_is_restarted_under_load_unnoticed(project: Project, service: str) -> None:
    with ThreadPoolExecutor(1) as thread:
        under_way = thread.submit(project.generate_many, 12)
        project.compose("restart", service)
        under_way.result()


def test_a_killed_worker_loses_nothing(project: Project) -> None:
    with ThreadPoolExecutor(1) as thread:
        under_way = thread.submit(project.generate_many, 20, steps=50)
        wait_until_denoising(project)
        project.compose("kill", "-s", "KILL", "unet_worker")
        project.up()
        under_way.result()
