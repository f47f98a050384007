"""What this machine has and lacks for SynerDiff, and what follows from it."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import psutil

from cli.embedded_redis import find_redis_binary
from cli.machine import cpu_flags, has_fast_bfloat16, memory_bytes, shm_bytes
from shared.errors import ConfigurationError
from shared.host import has_mps
from shared.settings import UnetWorkerSettings, available_threads

Verdict = Literal["good", "limited", "missing"]

_GIB: Final = 1 << 30
_MIB: Final = 1 << 20
_MIN_MEMORY_BYTES: Final = 2 * _GIB
_TELLING_FLAGS: Final = ("amx_bf16", "avx512_bf16", "bf16", "avx512f", "avx2", "neon", "asimd")
_PACKAGES: Final = ("torch", "diffusers", "transformers")
_MODEL_PARTS: Final = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at. missing: nothing runs without it. consequence: what follows."""

    subject: str
    value: str
    verdict: Verdict
    consequence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the services will choose here when nothing else is asked for."""

    device: str
    dtype: str
    threads: int
    transport: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings, and what the services will choose."""

    findings: tuple[Finding, ...]
    choices: Choices

    @property
    def is_able(self) -> bool:
        """Whether SynerDiff can run here."""
        return all(finding.verdict != "missing" for finding in self.findings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What torch says about the GPUs, or why it says nothing."""

    names: tuple[str, ...] = ()
    problem: str = ""


def diagnose(model: Path, data_folder: Path) -> Diagnosis:
    """Look at everything. Imports torch, which takes a few seconds."""
    gpu = look_for_gpu()
    flags = cpu_flags()
    shm = check_shm(shm_bytes())
    cpu_dtype = "bfloat16" if has_fast_bfloat16(flags) else "float32"
    findings = [
        check_python(sys.version_info[:3]),
        check_system(platform.system()),
        check_cores(os.cpu_count() or 1, available_threads()),
        check_cpu(flags),
        check_memory(memory_bytes(), int(psutil.virtual_memory().available)),
        shm,
        check_redis(),
        *(check_package(name) for name in _PACKAGES),
        *check_gpu(gpu, os.environ),
        check_model(model),
        check_data_folder(data_folder),
    ]
    tensors = "shm" if shm.verdict == "good" else "inline"
    return Diagnosis(
        findings=tuple(findings),
        choices=Choices(
            device="cuda" if gpu.names else "cpu",
            dtype="float16" if gpu.names else cpu_dtype,
            threads=available_threads(),
            transport="cuda_ipc" if gpu.names else tensors,
        ),
    )


def check_python(version: tuple[int, int, int]) -> Finding:
    """The interpreter that runs this."""
    is_good = version >= (3, 11)
    return Finding(
        subject="Python",
        value=".".join(map(str, version)),
        verdict="good" if is_good else "missing",
        consequence="" if is_good else "3.11 or newer is needed",
    )


def check_system(name: str) -> Finding:
    """The operating system."""
    is_good = name == "Linux"
    return Finding(
        subject="System",
        value=f"{name} {platform.release()}",
        verdict="good" if is_good else "missing",
        consequence="" if is_good else "workers need Linux: /proc and /dev/shm",
    )


def check_cores(num_cores: int, num_threads: int) -> Finding:
    """The cores, and how many of them this process may use."""
    is_cut = num_threads < num_cores
    return Finding(
        subject="Cores",
        value=f"{num_cores}, of which affinity and quota leave {num_threads}"
        if is_cut
        else f"{num_cores}, no quota",
        verdict="good",
        consequence=f"workers on the CPU share {num_threads} threads",
    )


def check_cpu(flags: frozenset[str]) -> Finding:
    """What the CPU computes with."""
    telling = [flag for flag in _TELLING_FLAGS if flag in flags]
    is_fast = has_fast_bfloat16(flags)
    return Finding(
        subject="CPU features",
        value=", ".join(telling) or "none that help",
        verdict="good" if is_fast else "limited",
        consequence="bfloat16 on the CPU, several times as fast as float32"
        if is_fast
        else "no bfloat16 instructions: float32 on the CPU, several times slower",
    )


def check_memory(total: int, available: int) -> Finding:
    """Main memory, within the cgroup's limit."""
    is_enough = total >= _MIN_MEMORY_BYTES
    return Finding(
        subject="Memory",
        value=f"{total / _GIB:.1f} GiB, {min(available, total) / _GIB:.1f} GiB free",
        verdict="good" if is_enough else "limited",
        consequence="" if is_enough else "five processes may not fit; large models will not",
    )


def check_shm(shm: tuple[int, int] | None) -> Finding:
    """Shared memory. shm: size and free bytes, None if there is none."""
    if shm is None:
        return Finding(
            subject="/dev/shm",  # noqa: S108 (a name to show)
            value="not there",
            verdict="missing",
            consequence="the UNet workers' tensor pools live there",
        )
    size, free = shm
    fields = UnetWorkerSettings.model_fields
    needed = fields["pool_slots"].default * fields["pool_slot_kb"].default * 1024
    is_enough = free >= needed
    return Finding(
        subject="/dev/shm",  # noqa: S108
        value=f"{size / _MIB:,.0f} MiB, {free / _MIB:,.0f} MiB free",
        verdict="good" if is_enough else "missing",
        consequence="latents go through shared memory"
        if is_enough
        else f"a UNet worker's pool takes {needed / _MIB:.0f} MiB there; "
        "in Docker, raise it with shm_size",
    )


def check_redis() -> Finding:
    """A server to embed."""
    try:
        binary = find_redis_binary()
    except ConfigurationError as error:
        return Finding(
            subject="Redis", value="no server", verdict="missing", consequence=str(error)
        )
    return Finding(subject="Redis", value=f"{binary}, {_short(binary.path)}", verdict="good")


def check_package(name: str) -> Finding:
    """A library without which no worker starts."""
    try:
        return Finding(subject=name, value=metadata.version(name), verdict="good")
    except metadata.PackageNotFoundError:
        return Finding(
            subject=name,
            value="not installed",
            verdict="missing",
            consequence=f"pip install {name}",
        )


def look_for_gpu() -> Gpu:
    """Ask torch for CUDA devices."""
    try:
        import torch  # noqa: PLC0415 (only here, and slow)

        if not torch.cuda.is_available():
            return Gpu(problem="" if torch.version.cuda else "this PyTorch is built without CUDA")
        return Gpu(names=tuple(_describe_gpu(torch, i) for i in range(torch.cuda.device_count())))
    except (ImportError, OSError, RuntimeError) as error:
        return Gpu(problem=f"PyTorch can't be used: {error}")


def _describe_gpu(torch: Any, index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    return f"{facts.name}, {facts.total_memory / _GIB:.0f} GiB, compute {facts.major}.{facts.minor}"


def check_gpu(gpu: Gpu, environment: os._Environ[str] | dict[str, str]) -> list[Finding]:
    """The GPUs, and whether two processes can share one. environment: this process's."""
    if not gpu.names:
        return [
            Finding(
                subject="GPU",
                value="none" + (f" ({gpu.problem})" if gpu.problem else ""),
                verdict="limited",
                consequence="everything runs on the CPU",
            )
        ]
    allocator = (
        f"{environment.get('PYTORCH_CUDA_ALLOC_CONF', '')},"
        f"{environment.get('PYTORCH_ALLOC_CONF', '')}"
    )
    is_shareable = "expandable_segments:true" not in allocator.lower().replace(" ", "")
    is_mps_client = has_mps(environment)
    return [
        *(
            Finding(subject=f"GPU {i}", value=name, verdict="good")
            for i, name in enumerate(gpu.names)
        ),
        Finding(
            subject="CUDA IPC",
            value="possible" if is_shareable else "broken by expandable_segments",
            verdict="good" if is_shareable else "missing",
            consequence="latents stay on the GPU"
            if is_shareable
            else "remove expandable_segments from PYTORCH_ALLOC_CONF",
        ),
        Finding(
            subject="CUDA MPS",
            value="running" if is_mps_client else "not running",
            verdict="good" if is_mps_client else "limited",
            consequence="UNet and VAE run side by side on one GPU"
            if is_mps_client
            else "processes take turns on a GPU: decodes run in gaps between the UNet's slots",
        ),
    ]


def check_model(folder: Path) -> Finding:
    """The model folder: its parts, not their contents."""
    if not (folder / "model_index.json").is_file():
        return Finding(
            subject="Model",
            value=f"none at {_short(folder)}",
            verdict="missing",
            consequence="name a diffusers folder with --model",
        )
    lacking = [part for part in _MODEL_PARTS if not (folder / part).is_dir()]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Finding(
        subject="Model",
        value=f"{_short(folder)}, {size / _MIB:,.0f} MiB",
        verdict="missing" if lacking else "good",
        consequence=f"without {', '.join(lacking)}" if lacking else "",
    )


def check_data_folder(folder: Path) -> Finding:
    """Where `synerdiff up` keeps its data: the folder, or the nearest one above that exists."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    is_writable = os.access(existing, os.W_OK | os.X_OK)
    status = os.statvfs(existing)
    free = status.f_bavail * status.f_frsize
    return Finding(
        subject="Data folder",
        value=f"{_short(folder)}, "
        + (f"{free / _GIB:,.1f} GiB free" if is_writable else "read-only"),
        verdict="good" if is_writable else "limited",
        consequence="" if is_writable else "choose another with --data-dir",
    )


def _short(path: Path) -> str:
    """A path for people: below the working directory, or the home, without them."""
    for start, sign in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path != start and path.is_relative_to(start):
            return f"{sign}{path.relative_to(start)}"
    return str(path)
