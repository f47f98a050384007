"""Forwards as diffusers runs them, on any device; the other backends are measured against it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from services.unet_worker.families.protocol import Conditions, Family, network_inputs
from shared.device import finish_work
from shared.messages import NO_ROOM, SlotShape

T = TypeVar("T")


class EagerBackend:
    """Calls the network; the methods' contracts are those of `Backend`.

    Args:
        family: Whose network is run.
    """

    def __init__(self, family: Family) -> None:
        self._family = family

    @property
    def is_batch_invariant(self) -> bool:
        """Return False: kernels may differ by the number of rows."""
        return False

    def prepare(self, sizes: Sequence[tuple[int, int]] = ()) -> bool:
        """Check the sizes; there is nothing to make faster."""
        self._family.facts.check_sizes(sizes)
        return False

    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the network's prediction."""
        inputs = network_inputs(self._family, sample, timestep, conditions)
        values = dict(zip(self._family.conditions, inputs[2:], strict=True))
        prediction: torch.Tensor = self._family.network(*inputs[:2], values)
        return prediction.float().contiguous()

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values on the device."""
        return tensor.to(self._family.device)

    def fetch(self, tensor: torch.Tensor) -> list[float]:
        """Return a vector's values."""
        values: list[float] = tensor.tolist()
        return values

    def finish(self) -> None:
        """Wait for the device."""
        finish_work(self._family.device)

    def serving_slot(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return contextlib.nullcontext()

    def handing_over(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return contextlib.nullcontext()

    def run(self, call: Callable[[], T], *, threads: int = 0, shape: SlotShape = NO_ROOM) -> T:
        """Return the call's result; no room is made."""
        del threads, shape
        return call()
