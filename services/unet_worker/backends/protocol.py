"""What a backend is: how a family's network and a slot's tensor work are run on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch

from services.unet_worker.families.protocol import Conditions
from shared.messages import NO_ROOM, SlotShape

T = TypeVar("T")


class Backend(Protocol):
    """Runs forwards. All methods belong on the compute thread, except `handing_over`."""

    @property
    def is_batch_invariant(self) -> bool:
        """Return whether a row's prediction is the same to the bit alone and among others.

        At the sizes that were prepared, on any number of threads, whatever runs beside.
        """

    def prepare(self, sizes: Sequence[tuple[int, int]] = ()) -> bool:
        """Make forwards fast at the model's default size and each (height, width) in pixels.

        Returns:
            Whether it could at all of them; forwards work at every size. The network must not
            change from then on.

        Raises:
            ConfigurationError: A side is no multiple of the model's `side_multiple`.
        """

    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the network's prediction: contiguous, float32, of the sample's shape.

        Args:
            sample: (rows, C, h, w), float32, on the device.
            timestep: (rows,), float32; Euler's are fractional.
            conditions: As the family names them, (rows, *shape) each.
        """

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a host tensor's values on the device, without waiting for the device."""

    def fetch(self, tensor: torch.Tensor) -> list[float]:
        """Return a vector's values once the device has computed them: a slot's one wait."""

    def finish(self) -> None:
        """Wait until the device has done what was asked of it; raise where it is lost."""

    def serving_slot(self) -> AbstractContextManager[None]:
        """Return a context in which a slot's small tensor work leaves the device to forwards."""

    def handing_over(self) -> AbstractContextManager[None]:
        """Return a context in which finished latents are copied beside the slots that follow."""

    def run(self, call: Callable[[], T], *, threads: int = 0, shape: SlotShape = NO_ROOM) -> T:
        """Return the call's result; its forwards make room for decode chunks as `shape` says.

        Args:
            call: Runs slots.
            threads: CPU threads that are set; 0 where they were not chosen.
            shape: What is left to chunks while any run.
        """
