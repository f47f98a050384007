"""Tensors as bytes: the dtypes that travel, and the `inline` transport's form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import HandleLostError

DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""The dtypes of latents, by the name that a `TensorHandle` carries."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

Bytes = npt.NDArray[np.uint8]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype on the wire.

    Raises:
        ValueError: Latents never have this dtype.
    """
    name = _NAMES.get(dtype)
    if name is None:
        raise ValueError(f"a tensor of {dtype} doesn't travel, only {', '.join(DTYPES)}")
    return name


def num_bytes(shape: Sequence[int], dtype: str) -> int:
    """Return the bytes of a dense tensor, from what a message claims.

    Raises:
        HandleLostError: An unknown dtype, no dimension, or a dimension below 1.
    """
    if dtype not in DTYPES:
        raise HandleLostError(f"unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not shape or any(size < 1 for size in shape):
        raise HandleLostError(f"shape {tuple(shape)} has no or empty dimensions")
    return math.prod(shape) * DTYPES[dtype].itemsize


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """Return a dense CPU tensor's own memory, shared, not copied."""
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8)
    return flat.numpy()  # type: ignore[no-any-return]


def pack_tensor(tensor: torch.Tensor) -> bytes:
    """Return a tensor's values, C order, the machine's byte order (little endian everywhere).

    Raises:
        ValueError: Latents never have this dtype.
    """
    dtype_name(tensor.dtype)
    return as_bytes(tensor.cpu().contiguous()).tobytes()


def unpack_tensor(payload: bytes, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """Return the tensor that `pack_tensor` packed: on the CPU, writable, the caller's own.

    Raises:
        HandleLostError: The bytes are not of this shape and dtype, or those are no tensor's.
    """
    expected = num_bytes(shape, dtype)
    if len(payload) != expected:
        raise HandleLostError(f"inline copy has {len(payload)} bytes, expected {expected}")
    tensor = torch.empty(tuple(shape), dtype=DTYPES[dtype])
    np.copyto(as_bytes(tensor), np.frombuffer(payload, np.uint8))
    return tensor
