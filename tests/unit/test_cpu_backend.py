"""A prepared network gives what the network of diffusers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from services.unet_worker.backends.cpu.backend import CpuBackend
from services.unet_worker.backends.cpu.group_norms import lay_out_group_norms
from services.unet_worker.families.loading import load_family
from shared.errors import ConfigurationError


def _backend(folder: Path, dtype: Any) -> CpuBackend:
    return CpuBackend(load_family(folder, device="cpu", dtype=dtype))


def _predict(backend: CpuBackend, rows: int, height: int, width: int) -> torch.Tensor:
    family, generator = backend._family, torch.Generator().manual_seed(rows)
    with torch.inference_mode():
        return backend.predict(
            torch.randn(rows, 4, height // 8, width // 8, generator=generator),
            torch.arange(rows) * 90.0 + 0.5,
            {
                name: torch.randn(rows, *spec.shape, generator=generator).to(spec.dtype)
                for name, spec in family.conditions.items()
            },
        )


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (40, 72)])
def test_the_graph_gives_exactly_what_diffusers_gives(
    tiny_model_folder: Path, rows: int, size: tuple[int, int]
) -> None:
    backend = _backend(tiny_model_folder, "float32")
    expected = _predict(backend, rows, *size)
    assert backend.prepare([(96, 64)])  # and the default of 64x64; the third is not recorded
    calls: list[Any] = []
    backend._family.network.register_forward_pre_hook(lambda *_: calls.append(1))
    predicted = _predict(backend, rows, *size)
    if rows == 1:  # as among others, where diffusers' kernels for a lone row differ from those
        assert_close(predicted, expected)
    else:
        assert torch.equal(predicted, expected)
    assert len(calls) == (1 if size == (40, 72) else 0)


def test_in_bfloat16_they_differ_by_rounding_alone(tiny_model_folder: Path) -> None:
    backend = _backend(tiny_model_folder, "bfloat16")
    expected = _predict(backend, 3, 64, 64)
    assert backend.prepare()
    assert_close(_predict(backend, 3, 64, 64), expected, atol=0.03 * float(expected.std()), rtol=0)


def test_a_size_that_can_not_be_generated_is_named(tiny_model_folder: Path) -> None:
    backend = _backend(tiny_model_folder, "float32")
    with pytest.raises(ConfigurationError, match="a size to warm up is 60x64: both sides"):
        backend.prepare([(64, 60)])


@pytest.mark.parametrize("positions", [16, 32])
@pytest.mark.parametrize("channels", [12, 64])
def test_group_norms_of_every_kind_stay_what_they_are(positions: int, channels: int) -> None:
    norm = torch.nn.GroupNorm(4, channels).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, channels, positions, positions)
    x = x.to(torch.bfloat16, memory_format=torch.channels_last)
    exact = torch.nn.functional.group_norm(
        x.float(), 4, norm.weight.float(), norm.bias.float(), norm.eps
    )
    lay_out_group_norms(norm)
    result = norm(x)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_close(result, exact.to(torch.bfloat16))


def test_a_unet_that_depends_on_its_rows_is_not_recorded(tiny_model_folder: Path) -> None:
    backend = _backend(tiny_model_folder, "float32")
    family: Any = backend._family
    convolution = family.unet.conv_in
    convolution.register_forward_hook(lambda _, inputs, output: output * len(inputs[0]))
    expected = _predict(backend, 5, 64, 64)
    assert not backend.prepare()
    assert torch.equal(_predict(backend, 5, 64, 64), expected)
