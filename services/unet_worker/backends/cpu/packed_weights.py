"""Weights laid out once as oneDNN's kernels read them, for recorded forwards on a CPU.

PyTorch hands oneDNN weights as they are stored, and oneDNN lays them out anew in every call. That
takes as long however few the rows are: a third of a row's forward. A call also costs some 20 us
before it computes, so linear layers that are given the same input (the attention's projections of
one map, those of the prompt in all blocks, those of the timestep) are one call. Either is used only
where it gives the same to the bit for random inputs of a few rows.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from services.unet_worker.backends.cpu.giving_way import set_threads

PROBED_ROWS: Final = (1, 2, 4, 8, 16, 32, 64)
"""A convolution's kernel may want another layout for another number of rows or threads. It would be
made in every call, by a routine that takes a hundred times as long; such a layer stays as it is."""

_Layers = tuple[Any, ...]

# What compiled graphs use, and has no other name. A script, since Python being recorded has no type
# for the empty list of scalars in these calls.
_SCRIPT = """
def pack_convolution(weight, padding: List[int], stride: List[int], dilation: List[int],
                     groups: int, size: List[int]):
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, size)

def pack_linear(weight):
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)

def layout(packed):
    return torch.ops.mkldnn._get_mkldnn_serialized_md(packed)

def convolution(x, weight, bias: Optional[Tensor], padding: List[int], stride: List[int],
                dilation: List[int], groups: int):
    scalars = torch.jit.annotate(List[Optional[number]], [])
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, "none", scalars, "")

def linear(x, weight, bias: Optional[Tensor]):
    scalars = torch.jit.annotate(List[Optional[number]], [])
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", scalars, "")
"""


@functools.cache
def _onednn() -> Any:
    """The functions above; RuntimeError where PyTorch was built without oneDNN."""
    return torch.jit.CompilationUnit(_SCRIPT)


class PackedWeights:
    """The packed weights of a model on a CPU, kept beside its own, which must not change any more.

    Args:
        model: Its layers are packed when they are first used.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._packed: dict[_Layers, torch.Tensor] = {}

    @contextlib.contextmanager
    def in_use(self, run: Callable[[], Any]) -> Iterator[int]:
        """Meanwhile the model's layers compute with packed weights where that changes nothing.

        run: calls the model with random inputs of the size that it will have meanwhile. Layers that
            then have equal inputs are taken for layers that are given the same.

        Yields:
            The number of layers that do.
        """
        inputs = _inputs_of_layers(self._model, run)
        calls: list[_PackedCall] = []
        try:
            for layers in _given_the_same(inputs):
                for call in self._usable(layers, inputs[layers[0]]):
                    call.replace_forwards()
                    calls.append(call)
            yield sum(len(call.layers) for call in calls)
        finally:
            for call in calls:
                call.restore_forwards()

    def _usable(self, layers: _Layers, x: torch.Tensor) -> Iterator[_PackedCall]:
        """One call for all of them, or calls for those which that works for alone."""
        if (call := self._call(layers, x)) is not None:
            yield call
        elif len(layers) > 1:
            for layer in layers:
                yield from self._usable((layer,), x)

    def _call(self, layers: _Layers, x: torch.Tensor) -> _PackedCall | None:
        """None where it would not do, or not give the same, for inputs of x's size."""
        try:
            weight = self._packed.get(layers)
            if weight is None:
                weight = _pack(layers, x)
            if any(_layout(weight) != wanted for wanted in _layouts(layers[0], x)):
                return None
            call = _PackedCall(layers, weight)
            is_same = all(_changes_nothing(call, x, threads) for threads in _thread_counts())
        except RuntimeError:  # not on this CPU, or not with this dtype
            return None
        if not is_same:
            return None
        self._packed[layers] = weight
        return call


class _PackedCall:
    """What some layers compute of one input. The first that is called does it for all.

    layers: a convolution, or linear layers in the order in which they are called.
    """

    def __init__(self, layers: _Layers, weight: torch.Tensor) -> None:
        self.layers = layers
        self._weight = weight
        biases = [one.bias for one in layers if one.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._outputs: dict[torch.nn.Module, torch.Tensor] = {}

    def replace_forwards(self) -> None:
        """Let the layers compute by this."""
        first = self.layers[0]
        first.register_buffer("packed_weight", self._weight)  # a graph holds no other tensors
        first.register_buffer("packed_bias", self._bias)
        for layer in self.layers:
            layer.forward = functools.partial(self, layer)

    def restore_forwards(self) -> None:
        """Let them compute as before."""
        del self.layers[0].packed_weight, self.layers[0].packed_bias
        for layer in self.layers:
            del layer.forward  # of the object; its class has the other

    def __call__(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        if layer is self.layers[0]:
            self._outputs = dict(zip(self.layers, self._compute(x), strict=True))
        return self._outputs.pop(layer)

    def _compute(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        first = self.layers[0]
        weight, bias = self._weight, self._bias
        if isinstance(first, torch.nn.Conv2d):
            return [_onednn().convolution(x, weight, bias, *_geometry(first))]
        y = _onednn().linear(x, weight, bias)
        return torch.split(y, [one.out_features for one in self.layers], dim=-1)


def _inputs_of_layers(
    model: torch.nn.Module, run: Callable[[], Any]
) -> dict[torch.nn.Module, torch.Tensor]:
    """The layers that could be packed, each with its one input, in the order of their calls."""
    inputs: dict[torch.nn.Module, torch.Tensor] = {}
    repeated = set()

    def note(layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if layer in inputs:
            repeated.add(layer)
        inputs[layer] = args[0]

    layers = [one for one in model.modules() if _is_convolution(one) or _is_linear(one)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: x for layer, x in inputs.items() if layer not in repeated}


def _given_the_same(inputs: Mapping[torch.nn.Module, torch.Tensor]) -> list[_Layers]:
    """Linear layers with equal inputs together, if all or none have a bias; convolutions alone."""
    groups: list[list[Any]] = []
    for layer, x in inputs.items():
        for group in groups if _is_linear(layer) else ():
            first = group[0]
            has_bias = (first.bias is None) == (layer.bias is None)
            if _is_linear(first) and has_bias and torch.equal(inputs[first], x):
                group.append(layer)
                break
        else:
            groups.append([layer])
    return [tuple(group) for group in groups]


def _is_convolution(layer: torch.nn.Module) -> bool:
    return type(layer) is torch.nn.Conv2d and layer.padding_mode == "zeros"


def _is_linear(layer: torch.nn.Module) -> bool:
    """In float32 they are not oneDNN's, which rounds differently."""
    return type(layer) is torch.nn.Linear and layer.weight.dtype == torch.bfloat16


def _pack(layers: _Layers, x: torch.Tensor) -> torch.Tensor:
    first = layers[0]
    if isinstance(first, torch.nn.Conv2d):
        return _pack_convolution(first, x, len(x))
    weights = torch.cat([one.weight for one in layers])
    packed: torch.Tensor = _onednn().pack_linear(weights)
    return packed


def _pack_convolution(layer: torch.nn.Conv2d, x: torch.Tensor, rows: int) -> torch.Tensor:
    size = [rows, *x.shape[1:]]
    packed: torch.Tensor = _onednn().pack_convolution(layer.weight, *_geometry(layer), size)
    return packed


def _layouts(layer: torch.nn.Module, x: torch.Tensor) -> Iterator[bytes]:
    """What a convolution's kernels want for several numbers of rows and threads.

    A linear layer's take what they are given.
    """
    if not isinstance(layer, torch.nn.Conv2d):
        return
    for threads in _thread_counts():
        with _running_on(threads):
            found = [_layout(_pack_convolution(layer, x, rows)) for rows in PROBED_ROWS]
        yield from found


def _changes_nothing(call: _PackedCall, x: torch.Tensor, threads: int) -> bool:
    """Whether layers give the same to the bit by the call, for up to a row more than x has.

    Of what is small PyTorch computes some by kernels of its own, which add up in another order:
    convolutions of a row alone on one thread in float32, products of under 4,096 terms in bfloat16.
    """
    with _running_on(threads):
        for rows in range(1, len(x) + 2):
            sample = torch.randn_like(torch.cat([x, x])[:rows])
            outputs = [(call(one, sample), one(sample)) for one in call.layers]
            if not all(itertools.starmap(torch.equal, outputs)):
                return False
    return True


def _thread_counts() -> set[int]:
    """Of a part of a forward's rows, and of all of them together."""
    return {1, torch.get_num_threads()}


@contextlib.contextmanager
def _running_on(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    set_threads(threads)
    try:
        yield
    finally:
        set_threads(before)


def _geometry(layer: torch.nn.Conv2d) -> tuple[Any, ...]:
    return layer.padding, layer.stride, layer.dilation, layer.groups


def _layout(packed: torch.Tensor) -> bytes:
    return bytes(_onednn().layout(packed).tolist())
