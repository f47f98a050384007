"""Layers whose kernels differ by the number of rows or threads get a form that the row fixes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from services.unet_worker.backends.cpu import batch_invariance
from services.unet_worker.backends.cpu.backend import CpuBackend
from services.unet_worker.backends.cpu.batch_invariance import (
    find_forms,
    in_forms,
    in_pairs,
    inputs_of_layers,
    on_one_thread,
    row_by_row,
)
from services.unet_worker.families.loading import load_family

pytestmark = pytest.mark.usefixtures("two_threads")


class LoneRowDiffers(torch.nn.Linear):
    """As kernels for vectors in place of matrices do it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (1e-6 if len(x) == 1 else 0.0)


class EveryNumberDiffers(torch.nn.Conv2d):
    """As kernels that are chosen by the number of rows do it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1e-6 * len(x)


class ThreadsDiffer(torch.nn.GroupNorm):
    """As sums that are split over threads do it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1e-6 * torch.get_num_threads()


@pytest.mark.parametrize(
    ("layer", "x", "form"),
    [
        (LoneRowDiffers(8, 8), torch.zeros(2, 8), in_pairs),
        (EveryNumberDiffers(4, 4, 3, padding=1), torch.zeros(2, 4, 6, 6), row_by_row),
        (ThreadsDiffer(2, 4), torch.zeros(2, 4, 3, 3), on_one_thread),
    ],
)
@torch.inference_mode()
def test_a_layer_that_depends_on_what_runs_beside_it_gets_another_form(
    layer: torch.nn.Module, x: torch.Tensor, form: Callable[..., Any]
) -> None:
    assert find_forms({layer: x}) == {layer: form}
    sample = torch.randn(5, *x.shape[1:])
    plain = layer(sample)
    with in_forms({layer: form}):
        together = layer(sample)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for i in range(5):
                assert torch.equal(layer(sample[i : i + 1]), together[i : i + 1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph: Any = torch.jit.trace(layer, torch.randn(2, *x.shape[1:]))  # type: ignore[no-untyped-call]
    assert "forward" not in vars(layer)
    assert_close(together, plain, atol=1e-4, rtol=1e-4)
    for rows in (1, 3, 5):
        assert torch.equal(graph(sample[:rows]), together[:rows])


@torch.inference_mode()
def test_a_layer_that_depends_on_nothing_stays_as_it_is() -> None:
    layer = torch.nn.GroupNorm(2, 4)
    assert not find_forms({layer: torch.zeros(2, 4, 4, 4)})


@torch.inference_mode()
def test_the_threads_are_those_of_before_after_a_layer_on_one() -> None:
    layer, seen = torch.nn.GroupNorm(2, 4), []
    layer.forward = lambda x: (seen.append(torch.get_num_threads()), x)[1]  # type: ignore[method-assign]
    on_one_thread(layer)(torch.zeros(1, 4, 4, 4))
    assert seen == [1]
    assert torch.get_num_threads() == 2


@torch.inference_mode()
def test_each_layer_that_is_called_once_is_found_with_its_input() -> None:
    twice, once = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(twice, once, twice)
    x = torch.randn(2, 3)
    inputs = inputs_of_layers(model, lambda: model(x))
    assert list(inputs) == [once]
    assert torch.equal(inputs[once], twice(x))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("float32", (64, 64)),
        ("float32", (256, 192)),
        ("bfloat16", (64, 64)),
        ("bfloat16", (256, 192)),
        ("bfloat16", (72, 40)),  # not recorded
    ],
)
def test_a_row_is_the_same_alone_and_among_others_on_any_threads(
    tiny_model_folder: Path, dtype: Any, size: tuple[int, int]
) -> None:
    family = load_family(tiny_model_folder, device="cpu", dtype=dtype)
    backend = CpuBackend(family)
    assert backend.prepare([(256, 192)])
    assert backend.is_batch_invariant
    generator = torch.Generator().manual_seed(0)
    rows = 7
    sample = torch.randn(rows, 4, size[0] // 8, size[1] // 8, generator=generator)
    timestep = torch.arange(rows) * 90.0
    embeds = torch.randn(rows, 16, 32, generator=generator).to(family.dtype)

    def predict(first: int, end: int) -> torch.Tensor:
        chosen = slice(first, end)
        return backend.predict(sample[chosen], timestep[chosen], {"prompt_embeds": embeds[chosen]})

    with torch.inference_mode():
        together = predict(0, rows)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for first, end in ((0, 1), (3, 4), (6, 7), (2, 4), (1, 6), (0, 7)):
                assert torch.equal(predict(first, end), together[first:end])


def test_a_backend_whose_graphs_are_not_consistent_says_so(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_invariance, "FORMS", ())
    backend = CpuBackend(load_family(tiny_model_folder, device="cpu", dtype="float32"))
    family: Any = backend._family
    family.unet.conv_in.__class__ = EveryNumberDiffers
    backend.prepare()
    assert not backend.is_batch_invariant
