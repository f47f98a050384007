"""Forms of layers in which a row's result is fixed by the row alone.

Kernels are chosen by the number of rows and of threads, and some of them add up in another order.
Then a row's bits depend on what runs beside it, and so do, a few steps later, whole pictures. Which
layers these are depends on processor, dtype and model, so they are found by trying: a layer is
*consistent* if random rows give the same bits in any number and on any threads. One that is not is
called in the first of these forms that is:

- on one thread: norms of large maps, whose sums are split over threads;
- in pairs: a lone row beside a copy of itself, where kernels only treat a single row differently;
- row by row, where they treat every number of rows differently;
- row by row on one thread.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from shared.settings import available_threads
from shared.threads import running_on, set_threads

ROWS: Final = (1, 2, 3, 4, 8)
"""Numbers of rows that are tried."""

MANY_ROWS: Final = 24
"""Tried on one thread alone, on which parts of a forward with so many rows run."""

MAX_ELEMENTS: Final = 1 << 22
"""Of what is tried: many rows of a large map would take longer than they are worth."""

MIN_TRIED_ROWS: Final = 3
"""Tried of maps of any size."""

LAYERS: Final = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.GroupNorm)
"""What has shown to depend on the number of rows or threads; attention and layer norms have not."""

Call = Callable[[torch.Tensor], torch.Tensor]
Form = Callable[[Any], Call]
"""Returns another way to call a layer."""

_outside = threading.local()
"""`threads`: what this thread computed on before `one_thread`."""


def tried_threads() -> tuple[int, ...]:
    """Return numbers of threads that a forward or a part of it may have."""
    threads = max(torch.get_num_threads(), available_threads())
    return tuple(sorted({1, max(threads // 2, 1), threads}))


def tried_rows(x: torch.Tensor) -> tuple[int, ...]:
    """Return numbers of rows like those of `x` that are worth trying."""
    limit = max(MAX_ELEMENTS // x[0].numel(), MIN_TRIED_ROWS)
    return tuple(rows for rows in (*ROWS, MANY_ROWS) if rows <= limit)


def gives(
    call: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    sample: torch.Tensor,
    expected: Sequence[torch.Tensor],
) -> bool:
    """Return whether the first rows of `sample` give those of `expected`, to the bit.

    Any number of rows is tried on any number of threads.
    """
    for threads in tried_threads():
        with running_on(threads):
            for rows in tried_rows(sample):
                if rows == MANY_ROWS and threads > 1:
                    continue
                for found, wanted in zip(call(sample[:rows]), expected, strict=True):
                    if not torch.equal(found, wanted[:rows]):
                        return False
    return True


def random_rows(x: torch.Tensor) -> torch.Tensor:
    """Return random rows of the size of x's, as many as are tried at most."""
    return torch.randn_like(torch.cat([x[:1]] * tried_rows(x)[-1]))


def inputs_of_layers(
    network: torch.nn.Module, run: Callable[[], Any]
) -> dict[torch.nn.Module, torch.Tensor]:
    """Return the layers that `run` calls once, each with its input, in the order of their calls."""
    inputs: dict[torch.nn.Module, torch.Tensor] = {}
    repeated = set()

    def note(layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if layer in inputs:
            repeated.add(layer)
        inputs[layer] = args[0]

    layers = [layer for layer in network.modules() if isinstance(layer, LAYERS)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: x for layer, x in inputs.items() if layer not in repeated}


def find_forms(
    inputs: Mapping[torch.nn.Module, torch.Tensor],
) -> dict[torch.nn.Module, Form]:
    """Return those of the layers that need another form, with the first that is consistent.

    Args:
        inputs: What each layer is given, any number of rows; their values don't matter.
    """
    found = {}
    for layer, x in inputs.items():
        if not _is_consistent(layer.forward, x):
            form = next((form for form in FORMS if _fits(form, layer, x)), None)
            if form is not None:
                found[layer] = form
    return found


@contextlib.contextmanager
def in_forms(forms: Mapping[torch.nn.Module, Form]) -> Iterator[None]:
    """Let these layers compute in their forms meanwhile."""
    for layer, form in forms.items():
        layer.forward = form(layer)
    try:
        yield
    finally:
        for layer in forms:
            del layer.forward  # of the object; its class has the other


def on_one_thread(layer: Any) -> Call:
    """Return the layer's call on one thread."""
    return _serially(layer.forward)


def in_pairs(layer: Any) -> Call:
    """Return the layer's call with a copy beside a lone row."""
    call, scripts = layer.forward, _scripts()

    def run(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = scripts.first_rows(call(scripts.paired(x)), x)
        return result

    return run


def row_by_row(layer: Any) -> Call:
    """Return the layer's call for one row after another."""
    scripts, weight, bias = _scripts(), layer.weight, layer.bias
    if isinstance(layer, torch.nn.Conv2d):
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return lambda x: scripts.convolved_rows(x, weight, bias, *geometry)
    if isinstance(layer, torch.nn.Linear):
        return lambda x: scripts.linear_rows(x, weight, bias)
    groups, eps = layer.num_groups, layer.eps
    return lambda x: scripts.normalised_rows(x, groups, weight, bias, eps)


def row_by_row_on_one_thread(layer: Any) -> Call:
    """Return the layer's call for one row after another, on one thread."""
    return _serially(row_by_row(layer))


FORMS: Final[tuple[Form, ...]] = (in_pairs, on_one_thread, row_by_row, row_by_row_on_one_thread)


def _serially(call: Call) -> Call:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = call(torch.ops.synerdiff.one_thread(x))
        result: torch.Tensor = torch.ops.synerdiff.all_threads(y)
        return result

    return run


def _is_consistent(call: Call, x: torch.Tensor) -> bool:
    sample = random_rows(x)
    return gives(lambda rows: [call(rows)], sample, [call(sample)])


def _fits(form: Form, layer: torch.nn.Module, x: torch.Tensor) -> bool:
    try:
        return _is_consistent(form(layer), x)
    except RuntimeError:  # not in this form
        return False


# Scripts, since loops over rows and what is done to a lone one have to be recorded as such. `x[:]`
# is another tensor than x, which recording would take for the result from there on.
_SCRIPT = """
def paired(x):
    if x.size(0) == 1:
        return torch.cat([x, x])
    return x[:]

def first_rows(y, x):
    return y[:x.size(0)]

def linear_rows(x, weight, bias: Optional[Tensor]):
    return torch.cat([torch.nn.functional.linear(row, weight, bias) for row in x.split(1)])

def convolved_rows(x, weight, bias: Optional[Tensor], stride: List[int], padding: List[int],
                   dilation: List[int], groups: int):
    return torch.cat(
        [torch.conv2d(row, weight, bias, stride, padding, dilation, groups) for row in x.split(1)])

def normalised_rows(x, groups: int, weight: Optional[Tensor], bias: Optional[Tensor], eps: float):
    return torch.cat(
        [torch.group_norm(row, groups, weight, bias, eps) for row in x.split(1)])
"""


@functools.cache
def _scripts() -> Any:
    return torch.jit.CompilationUnit(_SCRIPT)


def _one_thread(x: torch.Tensor) -> torch.Tensor:
    _outside.threads = torch.get_num_threads()
    set_threads(1)
    return x


def _all_threads(x: torch.Tensor) -> torch.Tensor:
    set_threads(_outside.threads)
    return x


for _name, _operation in (("one_thread", _one_thread), ("all_threads", _all_threads)):
    torch.library.define(f"synerdiff::{_name}", "(Tensor(a) x) -> Tensor(a)")
    torch.library.impl(f"synerdiff::{_name}", "cpu", _operation)
