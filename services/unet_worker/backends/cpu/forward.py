"""The UNet's forward, on a CPU as a recorded graph.

For a few rows diffusers' Python takes as long as the kernels that it calls, and it needs the
interpreter's lock for each of them. A graph recorded once calls the same kernels without either,
so that two of its calls can also run side by side. Then rows are split over the cores instead of
each operation: threads that share an operation wait for the slowest of them some three hundred
times a forward, and whoever takes a core for a moment, or is slow to wake up, stops them all.

`torch.jit` is on its way out, but what PyTorch names in its place, `torch.compile`, needs a C++
compiler wherever this runs, and `torch.export` gives Python again.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

from services.unet_worker.backends.cpu.giving_way import GivingWay, Parts, even_sizes, set_threads
from services.unet_worker.backends.cpu.packed_weights import PackedWeights

_Inputs = tuple[torch.Tensor, ...]


class UnetForward:
    """Calls a UNet, or what was recorded of it for inputs of that size.

    Args:
        unet: A diffusers `UNet2DConditionModel`.

    Attributes:
        splits_rows: Whether recorded forwards run in parts, as many as there are threads or rows;
            else each of their operations runs on all threads.
    """

    def __init__(self, unet: Any) -> None:
        self.splits_rows = True
        self._call = _PositionalCall(unet)
        self._weights = PackedWeights(unet)
        self._graphs: dict[torch.Size, Any] = {}
        self._threads = 0
        self._helpers: ThreadPoolExecutor | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The UNet's output, computed on the caller's threads or those that it holds for this.

        inputs: sample (rows, C, h, w), timestep (rows,), prompt embeddings (rows, tokens, width),
        and timestep_cond (rows, channels) of a UNet that takes one.
        """
        graph = self._graphs.get(inputs[0].shape[1:])
        callers = torch.get_num_threads()
        threads = self._threads or callers
        num_parts = min(threads, len(inputs[0])) if graph and self.splits_rows else 1
        try:
            if num_parts > 1:
                return self._in_parts(graph, inputs, num_parts, threads // num_parts)
            set_threads(threads)
            return (graph or self._call)(*inputs)  # type: ignore[no-any-return]
        finally:
            set_threads(callers)

    @contextlib.contextmanager
    def holding_threads(self) -> Iterator[None]:
        """Meanwhile only forwards run on the caller's threads, everything else of it on one.

        What is small gains nothing by many, and they would go on waiting for more of it.
        """
        self._threads = torch.get_num_threads()
        set_threads(1)
        try:
            yield
        finally:
            set_threads(self._threads)
            self._threads = 0

    def _in_parts(self, graph: Any, inputs: _Inputs, num_parts: int, threads: int) -> torch.Tensor:
        """All parts at once, the first in this thread; each on so many threads."""
        if self._helpers is None:
            self._helpers = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="part")
        giving_way = GivingWay.running
        rows = len(inputs[0])
        if giving_way and threads == 1:
            sizes = giving_way.part_sizes(rows, num_parts)
        else:
            sizes = even_sizes(rows, num_parts)
        parts = list(zip(*(torch.split(one, sizes) for one in inputs), strict=True))
        order = giving_way.parts(len(parts), threads) if giving_way else None
        others = [
            self._helpers.submit(_run_part, graph, part, threads, order, i)
            for i, part in enumerate(parts[1:], start=1)
        ]
        try:
            first = _run_part(graph, parts[0], threads, order, 0)
        finally:
            wait(others)
        return torch.cat([first, *(one.result() for one in others)])

    @torch.inference_mode()
    def record(self, *inputs: torch.Tensor) -> bool:
        """Use a graph for inputs like these, with any number of rows; returns whether there is one.

        It has to give exactly what the UNet gives, for random inputs. The UNet must not change from
        then on.

        inputs: as for a call, two rows or more; their values don't matter.
        """
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # what is found to be the same is so at every start
            inputs = tuple(torch.randn_like(one) for one in inputs)
            packed = self._weights.in_use(lambda: self._call(*inputs))
            graph = self._graph(inputs, packed) or self._graph(inputs, contextlib.nullcontext())
        if graph:
            self._graphs[inputs[0].shape[1:]] = graph
        return graph is not None

    def _graph(
        self, inputs: _Inputs, weights: contextlib.AbstractContextManager[object]
    ) -> Any | None:
        """None if the UNet can't be recorded, or not for any number of rows."""
        others = tuple(torch.randn_like(torch.cat([one, one[:1]])) for one in inputs)
        try:
            with weights, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of age, and for each Python condition on the way
                graph = torch.jit.trace(self._call, inputs, check_trace=False)  # type: ignore[no-untyped-call]
            return graph if torch.equal(graph(*others), self._call(*others)) else None
        except RuntimeError:
            return None


@torch.inference_mode()
def _run_part(
    graph: Any, inputs: _Inputs, threads: int, order: Parts | None, number: int
) -> torch.Tensor:
    set_threads(threads)
    with order.running(number) if order else contextlib.nullcontext():
        return graph(*inputs)  # type: ignore[no-any-return]


class _PositionalCall(torch.nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.eval()

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        prediction: torch.Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states=prompt_embeds,
            timestep_cond=timestep_cond,
            return_dict=False,
        )[0]
        return prediction
