"""Packed weights change how long a forward takes and nothing else."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from services.unet_worker import packed_weights
from services.unet_worker.measure import zero_inputs
from services.unet_worker.model import DiffusionModel, load_model
from services.unet_worker.packed_weights import PackedWeights
from services.unet_worker.prepare import prepare_unet
from services.unet_worker.slot import unet_inputs

pytestmark = pytest.mark.usefixtures("two_threads")

needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU"
)
WIDTH = 128
"""Wide enough for a row alone to be oneDNN's."""


NUM_LAYERS = 5


class Attention(torch.nn.Module):
    """Three layers with a bias and one without are given the same, another what they make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.unbiased = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(self.q(x) * self.k(x) + self.v(x)) + self.unbiased(x)
        return y


def _record(model: torch.nn.Module, x: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(model, x)


def _count(graph: Any, kind: str) -> int:
    return sum(node.kind() == kind for node in graph.inlined_graph.nodes())


def _inputs(model: DiffusionModel, rows: int) -> list[torch.Tensor]:
    inputs = unet_inputs(model, *zero_inputs(model, rows, 64, 64))
    return [torch.randn_like(one) for one in inputs]


@needs_bfloat16
@torch.inference_mode()
def test_layers_that_are_given_the_same_are_one_call() -> None:
    model, x = Attention().bfloat16(), torch.randn(5, WIDTH, dtype=torch.bfloat16)
    expected = model(x)
    with PackedWeights(model).in_use(lambda: model(x)) as num_packed:
        assert torch.equal(model(x), expected)
        graph = _record(model, x)
    if num_packed < NUM_LAYERS:
        pytest.skip(f"this CPU's kernels give the same for {num_packed} of {NUM_LAYERS} layers")
    assert _count(graph, "mkldnn::_linear_pointwise") == 3  # q, k and v; out; the one without bias
    assert not any("forward" in vars(layer) for layer in model.modules())
    more = torch.randn(9, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(graph(more), model(more))


@torch.inference_mode()
def test_linear_layers_in_float32_stay_as_they_are() -> None:
    model, x = Attention(), torch.randn(5, WIDTH)
    with PackedWeights(model).in_use(lambda: model(x)) as num_packed:
        assert num_packed == 0


@needs_bfloat16
@torch.inference_mode()
def test_a_layout_that_depends_on_the_rows_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = torch.nn.Conv2d(16, 16, 3, padding=1).bfloat16(), torch.randn(2, 16, 8, 8).bfloat16()
    layers = torch.nn.Sequential(layer)
    with PackedWeights(layers).in_use(lambda: layers(x)) as num_packed:
        if not num_packed:
            pytest.skip("this CPU's kernels want another layout for other numbers of rows")
    layouts = iter(range(100))
    monkeypatch.setattr(packed_weights, "_layout", lambda _: next(layouts))
    with PackedWeights(layers).in_use(lambda: layers(x)) as num_packed:
        assert num_packed == 0


@needs_bfloat16
@torch.inference_mode()
def test_what_does_not_give_exactly_the_same_is_not_used() -> None:
    model, x = Attention().bfloat16(), torch.randn(5, WIDTH, dtype=torch.bfloat16)
    with PackedWeights(model).in_use(lambda: model(x)) as num_packed:
        if num_packed < NUM_LAYERS:
            pytest.skip(f"this CPU's kernels give the same for {num_packed} of {NUM_LAYERS} layers")
    model.q.register_forward_hook(lambda *args: args[-1] + torch.rand(()))
    with PackedWeights(model).in_use(lambda: model(x)) as num_packed:
        assert num_packed == NUM_LAYERS - 1


@needs_bfloat16
@torch.inference_mode()
def test_a_layer_that_is_called_twice_stays_as_it_is() -> None:
    layer, x = torch.nn.Linear(WIDTH, WIDTH).bfloat16(), torch.randn(5, WIDTH).bfloat16()
    model = torch.nn.Sequential(layer, torch.nn.SiLU(), layer)
    expected = model(x)
    with PackedWeights(model).in_use(lambda: model(x)) as num_packed:
        assert num_packed == 0
        assert torch.equal(model(x), expected)


@torch.inference_mode()
def test_layers_are_themselves_again_after_an_error() -> None:
    model, x = Attention().bfloat16(), torch.randn(5, WIDTH, dtype=torch.bfloat16)
    with contextlib.suppress(ZeroDivisionError), PackedWeights(model).in_use(lambda: model(x)):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_forwards_are_the_same(
    tiny_model_folder: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = load_model(tiny_model_folder, device="cpu", dtype=dtype)
    assert prepare_unet(packed)
    monkeypatch.setattr(PackedWeights, "in_use", lambda *_: contextlib.nullcontext())
    plain = load_model(tiny_model_folder, device="cpu", dtype=dtype)
    assert prepare_unet(plain)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (1, 2, 5, 16, 33, 70):
            inputs = _inputs(plain, rows)
            found, expected = packed.forward(*inputs), plain.forward(*inputs)
            if dtype == "float32":
                assert torch.equal(found, expected)
            else:  # this small model has sums that are rarely rounded to another neighbour
                assert_close(found, expected, atol=0.03 * float(expected.std()), rtol=0)


@needs_bfloat16
def test_a_prepared_unet_uses_them(tiny_model_folder: Path) -> None:
    model = load_model(tiny_model_folder, device="cpu", dtype="bfloat16")
    inputs = _inputs(model, 2)
    with model.forward._weights.in_use(lambda: model.forward._call(*inputs)) as num_packed:
        if not num_packed:
            pytest.skip("this CPU's kernels have no layout that fits all numbers of rows")
    assert prepare_unet(model)
    [graph] = model.forward._graphs.values()
    packed = _count(graph, "mkldnn::_convolution_pointwise")
    packed += _count(graph, "mkldnn::_linear_pointwise")
    assert packed > 0
