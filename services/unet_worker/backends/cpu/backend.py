"""Forwards on a CPU: prepared once, recorded for each size, making room for decode chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from services.unet_worker.backends.cpu.giving_way import GivingWay, watch
from services.unet_worker.backends.cpu.group_norms import lay_out_group_norms
from services.unet_worker.backends.cpu.recorded import RecordedForward
from services.unet_worker.backends.eager import EagerBackend
from services.unet_worker.backends.measure import zero_inputs
from services.unet_worker.families.protocol import Conditions, Family, network_inputs
from shared.messages import NO_ROOM, SlotShape

T = TypeVar("T")

_ROWS = 2  # of what is recorded: one would be broadcast


class CpuBackend(EagerBackend):
    """Runs recorded forwards; the methods' contracts are those of `Backend`.

    Args:
        family: Whose network is run.
        splits_rows: Whether the cores share a forward's rows, which is faster, or each operation.
        has_chunks_beside: Whether decode chunks run on this CPU now; asked often, so it should
            take microseconds.
    """

    def __init__(
        self,
        family: Family,
        *,
        splits_rows: bool = True,
        has_chunks_beside: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(family)
        self.forward = RecordedForward(
            family.network, tuple(family.conditions), splits_rows=splits_rows
        )
        self._giving_way = GivingWay(has_chunks_beside)
        self._is_prepared = False

    @property
    def is_batch_invariant(self) -> bool:
        """Return whether every row gives the same bits alone and among others."""
        return self.forward.is_batch_invariant

    def prepare(self, sizes: Sequence[tuple[int, int]] = ()) -> bool:
        """Lay the network out for this CPU and record it at the default size and at these."""
        family, facts = self._family, self._family.facts
        sizes = [(facts.default_height, facts.default_width), *sizes]
        facts.check_sizes(sizes)
        if not self._is_prepared:
            lay_out_group_norms(family.network)
            watch(family.network)
            self._is_prepared = True
        are_recorded = [
            self.forward.record(*network_inputs(family, *zero_inputs(family, _ROWS, *size)))
            for size in sizes
        ]
        return all(are_recorded)

    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the prediction of the recorded network, or of the network at other sizes."""
        inputs = network_inputs(self._family, sample, timestep, conditions)
        return self.forward(*inputs).float().contiguous()

    def serving_slot(self) -> AbstractContextManager[None]:
        """Return a context in which only forwards run on the caller's threads."""
        return self.forward.holding_threads()

    def run(self, call: Callable[[], T], *, threads: int = 0, shape: SlotShape = NO_ROOM) -> T:
        """Return the call's result; its forwards give cores away while chunks run."""
        if not threads:
            return call()
        return self._giving_way.run(call, threads=threads, shape=shape)
