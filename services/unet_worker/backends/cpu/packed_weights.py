"""Weights laid out once as oneDNN's kernels read them, for recorded forwards on a CPU.

PyTorch hands oneDNN weights as they are stored, and oneDNN lays them out anew in every call. That
takes as long however few the rows are: a third of a row's forward. A call also costs some 20 us
before it computes, so linear layers that are given the same input (the attention's projections of
one map, those of the prompt in all blocks, those of the timestep) are one call. Either is used only
where random rows give the same to the bit: what the layers themselves give for many rows, in any
number and on any threads (`batch_invariance`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from services.unet_worker.backends.cpu.batch_invariance import (
    gives,
    random_rows,
    tried_threads,
)
from shared.threads import running_on

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
    def in_use(self, inputs: Mapping[torch.nn.Module, torch.Tensor]) -> Iterator[set[Any]]:
        """Let the model's layers compute with packed weights meanwhile, where that is exact.

        Args:
            inputs: What each layer is given of random inputs of the size that the model will have
                meanwhile. Layers that then have equal inputs are taken for layers that are given
                the same.

        Yields:
            The layers that do.
        """
        inputs = {
            layer: x for layer, x in inputs.items() if _is_convolution(layer) or _is_linear(layer)
        }
        calls: list[_PackedCall] = []
        try:
            for layers in _given_the_same(inputs):
                for call in self._usable(layers, inputs[layers[0]]):
                    call.replace_forwards()
                    calls.append(call)
            yield {layer for call in calls for layer in call.layers}
        finally:
            for call in calls:
                call.restore_forwards()

    def _usable(self, layers: _Layers, x: torch.Tensor) -> Iterator[_PackedCall]:
        """Yield a call for all of them, or calls for those for which that works alone."""
        if (call := self._call(layers, x)) is not None:
            yield call
        elif len(layers) > 1:
            for layer in layers:
                yield from self._usable((layer,), x)

    def _call(self, layers: _Layers, x: torch.Tensor) -> _PackedCall | None:
        """Return a call for inputs of x's size, None where it would not do or not be exact."""
        try:
            weight = self._packed.get(layers)
            if weight is None:
                weight = _pack(layers, x)
            if any(_layout(weight) != wanted for wanted in _layouts(layers[0], x)):
                return None
            call = _PackedCall(layers, weight)
            is_exact = _is_exact(call, x)
        except RuntimeError:  # not on this CPU, or not with this dtype
            return None
        if not is_exact:
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
        biases = [layer.bias for layer in layers if layer.bias is not None]
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
            self._outputs = dict(zip(self.layers, self.compute(x), strict=True))
        return self._outputs.pop(layer)

    def compute(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return what each of the layers makes of `x`."""
        first = self.layers[0]
        weight, bias = self._weight, self._bias
        if isinstance(first, torch.nn.Conv2d):
            return [_onednn().convolution(x, weight, bias, *_geometry(first))]
        y = _onednn().linear(x, weight, bias)
        return torch.split(y, [layer.out_features for layer in self.layers], dim=-1)


def _given_the_same(inputs: Mapping[torch.nn.Module, torch.Tensor]) -> list[_Layers]:
    """Return linear layers with equal inputs together, if all or none have a bias, others alone."""
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
    weights = torch.cat([layer.weight for layer in layers])
    packed: torch.Tensor = _onednn().pack_linear(weights)
    return packed


def _pack_convolution(layer: torch.nn.Conv2d, x: torch.Tensor, rows: int) -> torch.Tensor:
    size = [rows, *x.shape[1:]]
    packed: torch.Tensor = _onednn().pack_convolution(layer.weight, *_geometry(layer), size)
    return packed


def _layouts(layer: torch.nn.Module, x: torch.Tensor) -> Iterator[bytes]:
    """Yield what a convolution's kernels want for several numbers of rows and threads.

    A linear layer's take what they are given.
    """
    if not isinstance(layer, torch.nn.Conv2d):
        return
    for threads in tried_threads():
        with running_on(threads):
            found = [_layout(_pack_convolution(layer, x, rows)) for rows in PROBED_ROWS]
        yield from found


def _is_exact(call: _PackedCall, x: torch.Tensor) -> bool:
    """Return whether any number of rows gives by the call what the layers give for many.

    Of what is small PyTorch computes some by kernels of its own, which add up in another order:
    convolutions of a row alone on one thread in float32, products of under 4,096 terms in bfloat16.
    """
    sample = random_rows(x)
    return gives(call.compute, sample, [layer(sample) for layer in call.layers])


def _geometry(layer: torch.nn.Conv2d) -> tuple[Any, ...]:
    return layer.padding, layer.stride, layer.dilation, layer.groups


def _layout(packed: torch.Tensor) -> bytes:
    return bytes(_onednn().layout(packed).tolist())
