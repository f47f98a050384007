"""Chooses how a device's forwards are run."""

from __future__ import annotations

from collections.abc import Callable

from services.unet_worker.backends.cpu.backend import CpuBackend
from services.unet_worker.backends.cuda import CudaBackend
from services.unet_worker.backends.eager import EagerBackend
from services.unet_worker.backends.protocol import Backend
from services.unet_worker.families.protocol import Family


def choose_backend(
    family: Family,
    *,
    splits_rows: bool = True,
    has_chunks_beside: Callable[[], bool] = lambda: False,
) -> Backend:
    """Return the backend for the family's device.

    Args:
        family: Whose network is run.
        splits_rows: On a CPU, whether its cores share a forward's rows or each operation.
        has_chunks_beside: Whether decode chunks run on the device now; asked often.
    """
    if family.device.type == "cpu":
        return CpuBackend(family, splits_rows=splits_rows, has_chunks_beside=has_chunks_beside)
    if family.device.type == "cuda":
        return CudaBackend(family)
    return EagerBackend(family)
