from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cli import diagnosis
from cli.__main__ import app
from cli.diagnosis import Choices, Diagnosis, Finding, Gpu
from launch import machine
from shared.device import choose_dtype

MIB = 1 << 20
CHOICES = Choices(device="cpu", dtype="float32", threads=2, transport="shm")


def test_an_old_python_is_missing_its_successor() -> None:
    assert diagnosis.check_python((3, 10, 9)).verdict == "missing"
    assert diagnosis.check_python((3, 11, 0)).verdict == "good"


def test_a_system_without_proc_cannot_serve() -> None:
    assert diagnosis.check_system("Darwin").verdict == "missing"


def test_a_quota_is_told_beside_the_cores() -> None:
    finding = diagnosis.check_cores(64, 2)
    assert "64" in finding.value
    assert "2" in finding.consequence


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"avx2"}, "float32"), ({"avx512_bf16"}, "bfloat16"), ({"amx_bf16"}, "bfloat16")],
)
def test_bfloat16_follows_from_the_cpus_features(flags: set[str], dtype: str) -> None:
    assert dtype in diagnosis.check_cpu(frozenset(flags)).consequence


def test_the_dtype_told_is_the_one_that_the_workers_choose() -> None:
    told = "bfloat16" if machine.has_fast_bfloat16(machine.cpu_flags()) else "float32"
    assert choose_dtype("auto", torch.device("cpu")) == getattr(torch, told)


def test_shared_memory_must_hold_a_pool() -> None:
    assert diagnosis.check_shm((64 * MIB, 64 * MIB)).verdict == "good"
    assert "shm_size" in diagnosis.check_shm((64 * MIB, 8 * MIB)).consequence
    assert diagnosis.check_shm(None).verdict == "missing"


def test_little_memory_is_a_limit() -> None:
    assert diagnosis.check_memory(1 << 30, 1 << 29).verdict == "limited"


def test_the_cgroups_limit_is_the_memory_there_is(tmp_path: Path) -> None:
    everything = machine.memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_bytes(tmp_path) == everything
    (tmp_path / "memory.max").write_text("1048576\n")
    assert machine.memory_bytes(tmp_path) == MIB


def test_a_package_that_is_not_installed_is_missing() -> None:
    assert diagnosis.check_package("no-such-package").verdict == "missing"


def test_without_a_gpu_everything_runs_on_the_cpu() -> None:
    (finding,) = diagnosis.check_gpu(Gpu(), {})
    assert finding.verdict == "limited"


def test_expandable_segments_break_sharing_a_gpu(tmp_path: Path) -> None:
    gpu = Gpu(names=("H",))
    environment = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments: True",
        "CUDA_MPS_PIPE_DIRECTORY": str(tmp_path),
    }
    verdicts = {found.subject: found.verdict for found in diagnosis.check_gpu(gpu, environment)}
    assert verdicts == {"GPU 0": "good", "CUDA IPC": "missing", "CUDA MPS": "limited"}
    del environment["PYTORCH_CUDA_ALLOC_CONF"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mps_daemon:
        mps_daemon.bind(str(tmp_path / "control"))
        mps_daemon.listen()
        assert {found.verdict for found in diagnosis.check_gpu(gpu, environment)} == {"good"}


def test_a_model_folder_that_lacks_a_part_is_told_which(tmp_path: Path) -> None:
    assert diagnosis.check_model(tmp_path).verdict == "missing"
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("tokenizer", "text_encoder", "unet", "scheduler"):
        (tmp_path / part).mkdir()
    assert diagnosis.check_model(tmp_path).consequence == "without vae"
    (tmp_path / "vae").mkdir()
    assert diagnosis.check_model(tmp_path).verdict == "good"


def test_the_data_folder_may_be_yet_to_come(tmp_path: Path) -> None:
    assert diagnosis.check_data_folder(tmp_path / "a" / "b").verdict == "good"


@pytest.mark.parametrize(("verdict", "exit_code"), [("limited", 0), ("missing", 1)])
def test_only_what_is_missing_makes_doctor_fail(
    monkeypatch: pytest.MonkeyPatch, verdict: diagnosis.Verdict, exit_code: int
) -> None:
    found = Diagnosis(
        findings=(Finding(subject="[GPU]", value="none", verdict=verdict),), choices=CHOICES
    )
    monkeypatch.setattr(diagnosis, "diagnose", lambda *_: found)
    table = CliRunner().invoke(app, ["doctor"])
    assert table.exit_code == exit_code
    assert "[GPU]" in table.output
    assert any(line.startswith("This machine") for line in table.output.splitlines())
    answer = CliRunner().invoke(app, ["doctor", "--json"])
    assert answer.exit_code == exit_code
    assert json.loads(answer.output)["findings"][0]["verdict"] == verdict
    assert json.loads(answer.output)["choices"]["threads"] == 2
