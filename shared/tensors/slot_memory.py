"""Where a pool's slots lie, and how tensors get in and out: mapped memory, or a GPU's."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from shared.tensors.cuda_ipc import GpuIpc
from shared.tensors.layout import PoolFile, PoolLayout
from shared.tensors.wire import as_bytes


class SlotMemory(Protocol):
    """The slots of one pool. Its copies are over, on every device, when the calls return."""

    def write(self, slot: int, tensor: torch.Tensor) -> None:
        """Copy a tensor, on any device, into a slot that is large enough."""

    def read(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of a slot's beginning, which is large enough, on the memory's device."""


class MappedSlots:
    """Slots inside the pool's file. The calling thread copies, alone and without the GIL."""

    def __init__(self, file: PoolFile) -> None:
        self._file = file

    def write(self, slot: int, tensor: torch.Tensor) -> None:
        """Copy a tensor, on any device, into a slot that is large enough."""
        source = as_bytes(tensor.cpu().contiguous())
        np.copyto(self._file.slot_data(slot)[: source.size], source)

    def read(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of a slot's beginning, which is large enough, on the CPU."""
        tensor = torch.empty(shape, dtype=dtype)
        target = as_bytes(tensor)
        np.copyto(target, self._file.slot_data(slot)[: target.size])
        return tensor


class GpuSlots:
    """Slots in one allocation on a GPU, ours or one that we have opened.

    Args:
        memory: All slots, uint8, flat.
        layout: Where each one starts.
        ipc: For waiting until a copy is over.

    Raises:
        ValueError: The memory is smaller than the layout's data.
    """

    def __init__(self, memory: torch.Tensor, layout: PoolLayout, ipc: GpuIpc) -> None:
        if memory.numel() < layout.data_bytes:
            raise ValueError(f"{memory.numel()} bytes for slots of {layout.data_bytes}")
        self._memory = memory
        self._stride = layout.slot_stride
        self._ipc = ipc

    def write(self, slot: int, tensor: torch.Tensor) -> None:
        """Copy a tensor, on any device, into a slot that is large enough."""
        with torch.no_grad():
            self._slot(slot, tuple(tensor.shape), tensor.dtype).copy_(tensor)
        self._ipc.finish()

    def read(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of a slot's beginning, which is large enough, on the GPU."""
        copy = self._slot(slot, shape, dtype).clone()
        self._ipc.finish()
        return copy

    def _slot(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        start = slot * self._stride
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[start : start + size].view(dtype).view(shape)
