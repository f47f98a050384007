from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from shared.errors import ConfigurationError
from shared.host import (
    choose_transport,
    device_identity,
    has_mps,
    host_identity,
    is_same_device,
)
from shared.messages import WorkerInfo
from shared.worker import find_place

GPU = "cuda:aaaa+1.2"


def worker(**changes) -> WorkerInfo:
    common = {
        "worker_id": "w",
        "incarnation": "w-1",
        "kind": "unet",
        "device_group": "g",
        "host": "here",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "max_requests": 1,
        "model_id": "m",
        "pool": "synerdiff-w-1",
    }
    return WorkerInfo(**(common | changes))


@pytest.mark.parametrize(
    ("producer", "consumer", "transport"),
    [
        ({}, {}, "shm"),
        ({}, {"host": "there"}, "inline"),
        ({"pool": ""}, {}, "inline"),
        ({"device": GPU}, {"device": GPU}, "cuda_ipc"),
        ({"device": GPU}, {"device": GPU, "host": "there"}, "inline"),
        ({"device": GPU}, {"device": GPU, "incarnation": "w-1"}, "inline"),
        ({"device": GPU, "pool": ""}, {"device": GPU}, "inline"),
        ({"device": GPU}, {"device": "cuda:bbbb+1.2"}, "inline"),
        ({"device": GPU}, {"device": "cuda:aaaa+3.2"}, "inline"),
        ({"device": GPU}, {"device": "cpu"}, "inline"),
        ({"device": "cpu"}, {"device": GPU}, "inline"),
    ],
)
def test_the_transport_is_the_fastest_that_works(producer, consumer, transport) -> None:
    decoder = {"kind": "vae", "incarnation": "v-1", "pool": ""}
    assert choose_transport(worker(**producer), worker(**(decoder | consumer))) == transport


def test_a_host_is_told_by_its_memory_its_boot_and_its_user(tmp_path: Path) -> None:
    shm, other_shm = tmp_path / "shm", tmp_path / "other"
    shm.mkdir()
    other_shm.mkdir()
    boot, other_boot = tmp_path / "boot_id", tmp_path / "other_boot_id"
    boot.write_text("boot-1\n")
    other_boot.write_text("boot-2\n")
    here = host_identity(shm, boot, 1000)
    assert here == host_identity(shm, boot, 1000)
    assert here != host_identity(other_shm, boot, 1000)
    assert here != host_identity(shm, other_boot, 1000)
    assert here != host_identity(shm, boot, 1001)


def test_a_machine_without_dev_shm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="missing"):
        host_identity(tmp_path / "missing")


def test_a_gpu_is_openable_only_within_its_namespaces(tmp_path: Path) -> None:
    for container in ("a", "b"):
        (tmp_path / container).mkdir()
        for kind in ("pid", "ipc"):
            (tmp_path / container / kind).write_text("")
    device, elsewhere = (device_identity("aaaa", tmp_path / container) for container in "ab")
    assert device != elsewhere
    assert is_same_device(device, elsewhere)
    assert not is_same_device(device, device_identity("bbbb", tmp_path / "a"))
    assert device == device_identity("aaaa", tmp_path / "a")
    assert device_identity() == "cpu"


def test_only_a_daemon_that_lives_makes_mps_clients(tmp_path: Path) -> None:
    environment = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert not has_mps(environment)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        daemon.bind(str(tmp_path / "control"))
        daemon.listen()
        daemon.setblocking(False)
        assert has_mps(environment)
        with pytest.raises(BlockingIOError):
            daemon.accept()
    assert (tmp_path / "control").exists()
    assert not has_mps(environment)
    (tmp_path / "control").unlink()
    (tmp_path / "control").touch()
    assert not has_mps(environment)


@pytest.mark.parametrize(("device", "is_alone"), [("cpu", False), ("cuda", True)])
def test_a_worker_says_whether_its_device_runs_others_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, is_alone: bool
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr("shared.worker.gpu_uuid", lambda _: "aaaa")
    assert find_place(torch.device(device)).runs_side_by_side is not is_alone
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
        daemon.bind(str(tmp_path / "control"))
        daemon.listen()
        assert find_place(torch.device(device)).runs_side_by_side
