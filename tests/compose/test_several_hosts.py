"""A worker on another host: Redis over TLS with a password, no memory and no network in common.

The other host is a compose project of its own: its own network, IPC and PID namespaces. All that it
can reach of the first one is the port of its Redis.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from compose_project import Project, assert_same_picture, build_image, needs_engine, run

from cli.stack import reserve_port
from shared.errors import ConfigurationError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_engine]

OVERLAY = "deploy/compose.tls.yaml"
PASSWORD = "a secret/with @ odd:signs"
QUOTED_PASSWORD = "a%20secret%2Fwith%20%40%20odd%3Asigns"
PAIRS = "synerdiff_worker_pairs"


@pytest.fixture(scope="module")
def address() -> str:
    """Where containers reach this machine; an engine need not have a bridge, or give it one."""
    form = "{{range .IPAM.Config}}{{.Gateway}} {{end}}"
    inspect = ("docker", "network", "inspect", "bridge", "-f", form)
    answer = subprocess.run(inspect, capture_output=True, text=True, check=False)
    for gateway in answer.stdout.split():
        try:
            reserve_port(gateway, 0)
        except ConfigurationError:
            continue  # not an address of this machine, where the engine runs elsewhere
        return gateway
    pytest.skip("the engine's default bridge has no gateway address on this machine")


@pytest.fixture(scope="module")
def tls_folder(address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority of our own and a certificate for Redis, readable by the containers' users."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("redis", address)
    authority.cert_pem.write_to_path(folder / "ca.crt")
    certificate.private_key_pem.write_to_path(folder / "redis.key")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(folder / "redis.crt", append=True)
    for path in (folder, *folder.parents[:2], *folder.iterdir()):
        path.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def redis_port(address: str) -> int:
    return reserve_port(address, 0)


@pytest.fixture(scope="module")
def here(address: str, redis_port: int, tls_folder: Path) -> Iterator[Project]:
    build_image()
    project = Project(
        "here",
        OVERLAY,
        REDIS_PASSWORD=PASSWORD,
        REDIS_HOST=address,
        REDIS_PORT=str(redis_port),
        TLS_FOLDER=str(tls_folder),
        SYNERDIFF_REDIS_URL=f"rediss://:{QUOTED_PASSWORD}@redis:6379/0?ssl_ca_certs=/tls/ca.crt",
    )
    try:
        project.up()
        project.wait_healthy()
        project.wait_ready()
        yield project
    finally:
        project.down()


@pytest.fixture(scope="module")
def there(here: Project, address: str, redis_port: int, tls_folder: Path) -> Iterator[Project]:
    place = f"{address}:{redis_port}"
    project = Project(
        "there",
        OVERLAY,
        REDIS_PASSWORD=PASSWORD,
        TLS_FOLDER=str(tls_folder),
        SYNERDIFF_REDIS_URL=f"rediss://:{QUOTED_PASSWORD}@{place}/0?ssl_ca_certs=/tls/ca.crt",
    )
    try:
        project.up("--no-deps", "anchor", "vae_worker")
        project.wait_healthy()
        yield project
    finally:
        project.down()


def test_a_worker_elsewhere_gets_the_same_latents_inline(here: Project, there: Project) -> None:
    (near,) = here.containers("vae_worker")
    (far,) = there.containers("vae_worker")
    (scheduler,) = here.containers("scheduler")
    here.wait_until(
        lambda: (
            here.metric(scheduler, PAIRS)
            == Counter({'{transport="shm"}': 1, '{transport="inline"}': 1})
        ),
        "the scheduler does not see both",
    )
    run("docker", "stop", far)
    by_shm = here.generate(5)
    assert here.metric(near, "synerdiff_transfers_total") == Counter({'{transport="shm"}': 1})
    run("docker", "start", far)
    there.wait_healthy()
    run("docker", "stop", near)
    assert_same_picture(here.generate(5), by_shm)
    assert there.metric(far, "synerdiff_transfers_total") == Counter({'{transport="inline"}': 1})


def test_without_the_password_nobody_gets_in(here: Project) -> None:
    (redis,) = here.containers("redis")
    cli = ("redis-cli", "--tls", "--cacert", "/tls/ca.crt", "-h", "redis", "--no-auth-warning")
    assert "NOAUTH" in run("docker", "exec", "-e", "REDISCLI_AUTH=", redis, *cli, "ping")
    assert PASSWORD not in here.compose("logs")
    assert QUOTED_PASSWORD not in here.compose("logs")
