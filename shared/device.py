"""Which device and dtype a worker computes with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from shared.errors import ConfigurationError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

_AMPERE = (8, 0)  # compute capability of the first GPUs with bfloat16


def choose_device(name: str) -> torch.device:
    """The device that `name` means here.

    Raises:
        ConfigurationError: No such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(
            f"device {name!r} is unknown; it should be auto, cpu, cuda or cuda:N"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device {name!r} should be auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        num_devices = torch.cuda.device_count()
        if (device.index or 0) >= num_devices:
            raise ConfigurationError(
                f"device {name!r} is not there; this machine has {num_devices} CUDA devices"
            )
    return device


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the dtype that `name` means on `device`.

    "auto" is bfloat16 where the processor multiplies it itself (GPUs from Ampere on, CPUs with
    instructions for it), else float16 on a GPU and float32 on a CPU.

    Raises:
        ConfigurationError: No such dtype.
    """
    names = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name in names:
        return names[name]
    if name != "auto":
        raise ConfigurationError(f"dtype {name!r} should be auto, {', '.join(names)}")
    if device.type == "cuda":
        is_ampere = torch.cuda.get_device_capability(device) >= _AMPERE
        return torch.bfloat16 if is_ampere else torch.float16
    return torch.bfloat16 if _has_fast_bfloat16() else torch.float32


def _has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; elsewhere it is slower than float32."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def finish_work(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that a clock read now is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
