"""Forwards on a GPU: a CUDA graph for each size and bucket of rows, and nothing waited for.

A forward of a few rows takes the host longer to launch than the GPU to run. A graph is launched as
a whole. It reads from and writes to buffers of its own, so rows are copied into them; those beyond
the last of a bucket compute what is thrown away.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from services.unet_worker.backends.eager import EagerBackend
from services.unet_worker.backends.measure import zero_inputs
from services.unet_worker.families.protocol import Conditions, Family, network_inputs

BUCKETS: Final = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of rows for which there are graphs; more rows run without one."""

_WARM_UPS: Final = 3  # what torch.cuda.graphs asks for ahead of a capture


class Capture(Protocol):
    """Records what a call launches."""

    def __call__(self, call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Return what launches it again, and the output that is written each time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Graph:
    """A forward that was captured."""

    inputs: tuple[torch.Tensor, ...]
    """What it reads: sample, timestep and each condition, as many rows as its bucket has."""

    output: torch.Tensor
    """What it writes: float32, as many rows."""

    launch: Callable[[], None]
    """Run it."""


class CudaBackend(EagerBackend):
    """Launches captured forwards; the methods' contracts are those of `Backend`.

    A row's bits depend on the bucket it runs in, so `is_batch_invariant` is False.

    Args:
        family: Whose network is run.
        max_rows: Of the largest graph.
        capture: How calls are captured; None captures CUDA graphs.
    """

    def __init__(
        self, family: Family, *, max_rows: int = BUCKETS[-1], capture: Capture | None = None
    ) -> None:
        super().__init__(family)
        self._capture = capture or GraphCapture(family.device)
        self._buckets = tuple(rows for rows in BUCKETS if rows <= max_rows)
        self._graphs: dict[tuple[torch.Size, int], _Graph] = {}
        self._side_stream = make_stream(family.device)

    def prepare(self, sizes: Sequence[tuple[int, int]] = ()) -> bool:
        """Capture a graph for each bucket of rows at the default size and at these."""
        facts = self._family.facts
        sizes = [(facts.default_height, facts.default_width), *sizes]
        facts.check_sizes(sizes)
        # The largest first: the others find room in its memory.
        for size, rows in itertools.product(sizes, reversed(self._buckets)):
            self._prepare(rows, size)
        return True

    @torch.inference_mode()
    def _prepare(self, rows: int, size: tuple[int, int]) -> None:
        inputs = network_inputs(self._family, *zero_inputs(self._family, rows, *size))
        launch, output = self._capture(lambda: self._call(inputs))
        key = (inputs[0].shape[1:], rows)
        self._graphs[key] = _Graph(inputs=inputs, output=output, launch=launch)

    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the prediction of the smallest graph that has room for the rows."""
        rows = len(sample)
        bucket = next((bucket for bucket in self._buckets if bucket >= rows), None)
        graph = self._graphs.get((sample.shape[1:], bucket)) if bucket else None
        if graph is None:
            return super().predict(sample, timestep, conditions)
        values = (conditions[name] for name in self._family.conditions)
        for buffer, value in zip(graph.inputs, (sample, timestep, *values), strict=True):
            buffer[:rows].copy_(value)
        graph.launch()
        return graph.output[:rows].clone()

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values on the GPU, by way of pinned memory, which nothing has to wait for."""
        return tensor.pin_memory().to(self._family.device, non_blocking=True)

    def handing_over(self) -> AbstractContextManager[None]:
        """Return a context whose copies wait for what is launched so far, and for nothing after."""
        return _beside(self._side_stream, self._family.device)

    def _call(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        sample, timestep, *values = inputs
        named = dict(zip(self._family.conditions, values, strict=True))
        prediction: torch.Tensor = self._family.network(sample, timestep, named)
        return prediction.float().contiguous()


class GraphCapture:
    """Captures CUDA graphs that share their memory: only one of them runs at a time.

    Args:
        device: Where calls compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Any = None

    def __call__(self, call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Return what launches the call again, and the output that is written each time."""
        with torch.cuda.device(self._device):
            side = make_stream(self._device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory):
                output = call()
            self._memory = self._memory or graph.pool()
        return graph.replay, output


def make_stream(device: torch.device) -> Any:
    """Return a stream of the GPU, None where PyTorch has no CUDA."""
    cuda: Any = torch.cuda
    return cuda.Stream(device) if device.type == "cuda" and cuda.is_available() else None


@contextlib.contextmanager
def _beside(stream: Any, device: torch.device) -> Iterator[None]:
    if stream is None:
        yield
        return
    cuda: Any = torch.cuda
    computed = cuda.Event()
    computed.record(cuda.default_stream(device))
    with cuda.stream(stream):
        stream.wait_event(computed)
        yield
