"""A network's forward as a recorded graph.

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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

from services.unet_worker.backends.cpu.batch_invariance import (
    Form,
    find_forms,
    in_forms,
    inputs_of_layers,
    tried_threads,
)
from services.unet_worker.backends.cpu.giving_way import GivingWay, Parts, even_sizes
from services.unet_worker.backends.cpu.packed_weights import PackedWeights
from shared.threads import running_on, set_threads

MAX_SIZES = 64
"""Sizes that were not recorded whose layers are remembered; clients choose them."""

CHECKED_ROWS = (1, 2, 3, 5)
"""Numbers of rows in which a recorded graph has to give the same."""

_Inputs = tuple[torch.Tensor, ...]


class RecordedForward:
    """Calls a network, or what was recorded of it for inputs of that size.

    Args:
        network: Of a family.
        condition_names: Its conditions, in the order in which inputs have them.
        splits_rows: Whether recorded forwards run in parts, as many as there are threads or rows;
            else each of their operations runs on all threads.

    Attributes:
        is_batch_invariant: Whether a row gives the same bits in any number of rows and on any
            threads, at all sizes so far.
    """

    def __init__(
        self, network: torch.nn.Module, condition_names: tuple[str, ...], *, splits_rows: bool
    ) -> None:
        self._splits_rows = splits_rows
        self._call = _PositionalCall(network, condition_names)
        self._weights = PackedWeights(network)
        self._graphs: dict[torch.Size, Any] = {}
        self._forms: OrderedDict[torch.Size, Mapping[torch.nn.Module, Form]] = OrderedDict()
        self._threads = 0
        self._helpers: ThreadPoolExecutor | None = None
        self.is_batch_invariant = True

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the network's output, computed on the caller's threads or those held for it.

        Args:
            inputs: Sample (rows, C, h, w), timestep (rows,), and each condition (rows, *shape).
        """
        graph = self._graphs.get(inputs[0].shape[1:])
        callers = torch.get_num_threads()
        threads = self._threads or callers
        num_parts = min(threads, len(inputs[0])) if graph and self._splits_rows else 1
        try:
            if num_parts > 1:
                return self._in_parts(graph, inputs, num_parts, threads // num_parts)
            set_threads(threads)
            return graph(*inputs) if graph else self._call_plain(inputs)
        finally:
            set_threads(callers)

    @contextlib.contextmanager
    def holding_threads(self) -> Iterator[None]:
        """Run only forwards on the caller's threads meanwhile, everything else of it on one.

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
        """Run all parts at once, each on so many threads, and return their outputs as one."""
        if self._helpers is None:
            self._helpers = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="part")
        giving_way = GivingWay.running
        rows = len(inputs[0])
        if giving_way and threads == 1:
            sizes = giving_way.part_sizes(rows, num_parts)
        else:
            sizes = even_sizes(rows, num_parts)
        parts = list(zip(*(torch.split(tensor, sizes) for tensor in inputs), strict=True))
        order = giving_way.parts(len(parts), threads) if giving_way else None
        others = [
            self._helpers.submit(_run_part, graph, part, threads, order, i)
            for i, part in enumerate(parts[1:], start=1)
        ]
        try:
            first = _run_part(graph, parts[0], threads, order, 0)
        finally:
            wait(others)
        return torch.cat([first, *(other.result() for other in others)])

    @torch.inference_mode()
    def record(self, *inputs: torch.Tensor) -> bool:
        """Use a graph for inputs like these from now on, with any number of rows.

        It has to give exactly what the network gives, for random inputs. The network must not
        change from then on.

        Args:
            inputs: As for a call, two rows or more; their values don't matter.

        Returns:
            Whether there is such a graph.
        """
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # what is found to be the same is so at every start
            inputs = tuple(torch.randn_like(tensor) for tensor in inputs)
            given = inputs_of_layers(self._call, lambda: self._call(*inputs))
            with self._weights.in_use(given) as packed:
                rest = {layer: x for layer, x in given.items() if layer not in packed}
                graph = self._graph(inputs, find_forms(rest))
            graph = graph or self._graph(inputs, find_forms(given))
            if graph:
                self._graphs[inputs[0].shape[1:]] = graph
            call = graph or (lambda *rows: self._call_plain(rows))
            self.is_batch_invariant &= _is_consistent(call, inputs)
        return graph is not None

    def _graph(self, inputs: _Inputs, forms: Mapping[torch.nn.Module, Form]) -> Any | None:
        """Return a graph, or None if there is none that holds for any number of rows."""
        others = _random_rows(inputs, len(inputs[0]) + 1)
        try:
            with in_forms(forms), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of age, and for each Python condition on the way
                graph = torch.jit.trace(self._call, inputs, check_trace=False)  # type: ignore[no-untyped-call]
                return graph if torch.equal(graph(*others), self._call(*others)) else None
        except RuntimeError:
            return None

    def _call_plain(self, inputs: _Inputs) -> torch.Tensor:
        """Return the network's output at a size that was not recorded, rows independent, too."""
        size = inputs[0].shape[1:]
        if size not in self._forms:
            if len(self._forms) >= MAX_SIZES:
                self._forms.popitem(last=False)
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                probe = _random_rows(inputs, 2)
                self._forms[size] = find_forms(
                    inputs_of_layers(self._call, lambda: self._call(*probe))
                )
        self._forms.move_to_end(size)
        with in_forms(self._forms[size]):
            return self._call(*inputs)  # type: ignore[no-any-return]


def _random_rows(inputs: _Inputs, rows: int) -> _Inputs:
    """Return so many random rows like those of `inputs`."""
    return tuple(torch.randn_like(torch.cat([tensor[:1]] * rows)) for tensor in inputs)


def _is_consistent(call: Callable[..., torch.Tensor], inputs: _Inputs) -> bool:
    """Return whether a row gives the same bits in any number of rows and on any threads."""
    rows = _random_rows(inputs, CHECKED_ROWS[-1])
    expected = call(*rows)
    for threads in tried_threads():
        with running_on(threads):
            for number in CHECKED_ROWS:
                found = call(*(tensor[:number] for tensor in rows))
                if not torch.equal(found, expected[:number]):
                    return False
    return True


@torch.inference_mode()
def _run_part(
    graph: Any, inputs: _Inputs, threads: int, order: Parts | None, number: int
) -> torch.Tensor:
    set_threads(threads)
    with order.running(number) if order else contextlib.nullcontext():
        return graph(*inputs)  # type: ignore[no-any-return]


class _PositionalCall(torch.nn.Module):
    """A family's network with its conditions as positional arguments, which can be recorded."""

    def __init__(self, network: torch.nn.Module, condition_names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self._names = condition_names
        self.eval()

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, *conditions: torch.Tensor
    ) -> torch.Tensor:
        """Return the network's prediction."""
        named = dict(zip(self._names, conditions, strict=True))
        prediction: torch.Tensor = self.network(sample, timestep, named)
        return prediction
