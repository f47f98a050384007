"""PyTorch's own CUDA IPC behind an interface: the only file that calls its private parts.

The calls are those of `torch.multiprocessing.reductions` (`reduce_tensor`, `rebuild_cuda_tensor`),
with their primitive fields laid open, so that nothing is pickled; a test compares the argument
lists with the installed PyTorch's own source.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from shared.errors import ConfigurationError, HandleLostError
from shared.host import device_identity

ALLOCATOR_VARIABLES: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaExport:
    """One export of a GPU allocation, for exactly one open in another process.

    storage_handle, storage_offset_bytes: CUDA's handle of the allocation and the place in it.
    storage_bytes: size. counter_handle, counter_offset: the shared-memory file and the place in it
    where PyTorch counts this export's users. event_handle: recorded at the export; is_event_needed:
    whether the consumer has to wait for it.
    """

    storage_handle: bytes
    storage_bytes: int
    storage_offset_bytes: int
    counter_handle: bytes
    counter_offset: int
    event_handle: bytes
    is_event_needed: bool


class GpuIpc(Protocol):
    """GPU memory that other processes can open; what `TensorPool` and `TensorReader` need of it."""

    @property
    def device(self) -> str:
        """Return the identity (`shared.host`) of the GPU whose memory this allocates and opens."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return fresh memory, uint8, flat, that can be exported."""

    def export(self, memory: torch.Tensor) -> CudaExport:
        """Return another export of allocated memory."""

    def open(self, export: CudaExport) -> torch.Tensor:
        """Return another process's memory, uint8, flat; dropping the tensor closes it.

        Raises:
            HandleLostError: It can't be opened.
        """

    def discard(self, export: CudaExport) -> None:
        """Take back an export of our own that nobody has opened."""

    def finish(self) -> None:
        """Wait until every copy that this thread has begun is over."""


class TorchIpc:
    """The real thing, on one GPU.

    Args:
        device: "cuda" or "cuda:N".

    Raises:
        ConfigurationError: The allocator is set to expandable segments.
    """

    def __init__(self, device: torch.device) -> None:
        refuse_expandable_segments(os.environ)
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._identity = device_identity(gpu_uuid(self._device))

    @property
    def device(self) -> str:
        """Return the GPU's identity, the same in every process that may open its memory."""
        return self._identity

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return fresh memory, uint8, flat, that can be exported."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def export(self, memory: torch.Tensor) -> CudaExport:
        """Return another export of our memory, which PyTorch keeps until every user is gone."""
        storage: Any = memory.untyped_storage()
        with torch.cuda.device(self._device):
            (
                _device,
                handle,
                storage_size_bytes,
                storage_offset_bytes,
                ref_counter_handle,
                ref_counter_offset,
                event_handle,
                event_sync_required,
            ) = storage._share_cuda_()
        return CudaExport(
            storage_handle=handle,
            storage_bytes=storage_size_bytes,
            storage_offset_bytes=storage_offset_bytes,
            counter_handle=ref_counter_handle,
            counter_offset=ref_counter_offset,
            event_handle=event_handle,
            is_event_needed=event_sync_required,
        )

    def open(self, export: CudaExport) -> torch.Tensor:
        """Return another process's memory on this GPU, under this process's ordinal for it.

        Raises:
            HandleLostError: CUDA refuses: the exporter is gone, is this process, or can't be seen.
        """
        rebuild: Any = rebuild_cuda_tensor
        try:
            with torch.cuda.device(self._device):
                return rebuild(**rebuild_arguments(export, self._device.index))  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise HandleLostError(f"CUDA IPC can't open the pool: {error}") from error

    def discard(self, export: CudaExport) -> None:
        """Count down an export of our own that nobody has opened."""
        storage_class: Any = torch.UntypedStorage
        storage_class._release_ipc_counter(  # noqa: SLF001 (what rebuild_cuda_tensor calls)
            export.counter_handle, export.counter_offset, device=self._device
        )

    def finish(self) -> None:
        """Wait for this thread's current stream of the GPU."""
        torch.cuda.current_stream(self._device).synchronize()


def rebuild_arguments(export: CudaExport, device_index: int) -> dict[str, Any]:
    """Return `rebuild_cuda_tensor`'s arguments to open an export on our GPU of that ordinal."""
    return {
        "tensor_cls": torch.Tensor,
        "tensor_size": torch.Size([export.storage_bytes]),
        "tensor_stride": (1,),
        "tensor_offset": 0,
        "storage_cls": torch.UntypedStorage,
        "dtype": torch.uint8,
        "storage_device": device_index,
        "storage_handle": export.storage_handle,
        "storage_size_bytes": export.storage_bytes,
        "storage_offset_bytes": export.storage_offset_bytes,
        "requires_grad": False,
        "ref_counter_handle": export.counter_handle,
        "ref_counter_offset": export.counter_offset,
        "event_handle": export.event_handle,
        "event_sync_required": export.is_event_needed,
    }


def gpu_ipc(device: torch.device) -> TorchIpc | None:
    """Return what shares a device's memory; None on a CPU, whose pools lie in shared memory.

    Raises:
        ConfigurationError: The allocator is set to expandable segments.
    """
    return TorchIpc(device) if device.type == "cuda" else None


def gpu_uuid(device: torch.device) -> str:
    """Return the GPU's UUID, which is the same in every process, unlike its ordinal."""
    properties: Any = torch.cuda.get_device_properties(device)
    return str(properties.uuid)


def refuse_expandable_segments(environ: Mapping[str, str]) -> None:
    """Stop where PyTorch's allocator is set to segments that CUDA IPC can't export.

    Raises:
        ConfigurationError: Names the variable and what to take out of it.
    """
    for variable in ALLOCATOR_VARIABLES:
        options = (option.strip() for option in environ.get(variable, "").split(","))
        if any(_is_expandable(option) for option in options):
            raise ConfigurationError(
                f"{variable}={environ[variable]!r} turns on expandable_segments, whose memory CUDA "
                "IPC can't share between processes (pytorch #165685). Take it out, or set "
                "SYNERDIFF_TRANSPORT=inline."
            )


def _is_expandable(option: str) -> bool:
    name, _, value = option.partition(":")
    return name.strip() == "expandable_segments" and value.strip().lower() in ("true", "1")
