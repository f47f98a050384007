"""A prepared UNet gives what the UNet of diffusers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from services.unet_worker.group_norms import lay_out_group_norms
from services.unet_worker.model import DiffusionModel, load_model
from services.unet_worker.prepare import prepare_unet
from services.unet_worker.slot import predict_noise
from shared.errors import ConfigurationError


def _predict(model: DiffusionModel, rows: int, height: int, width: int) -> torch.Tensor:
    facts, generator = model.facts, torch.Generator().manual_seed(rows)
    factor = facts.vae_scale_factor
    shape = (rows, facts.latent_channels, height // factor, width // factor)
    embeds = torch.randn(rows, facts.max_tokens, facts.text_width, generator=generator)
    with torch.inference_mode():
        return predict_noise(
            model,
            torch.randn(shape, generator=generator),
            torch.arange(rows) * 90.0 + 0.5,
            embeds.to(model.dtype),
            torch.zeros(rows, facts.timestep_cond_channels, dtype=model.dtype),
        )


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (40, 72)])
def test_the_graph_gives_exactly_what_diffusers_gives(
    tiny_model_folder: Path, rows: int, size: tuple[int, int]
) -> None:
    model = load_model(tiny_model_folder, device="cpu", dtype="float32")
    expected = _predict(model, rows, *size)
    assert prepare_unet(model, [(96, 64)])  # and the default of 64x64; the third is not recorded
    calls: list[Any] = []
    model.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(_predict(model, rows, *size), expected)
    assert len(calls) == (1 if size == (40, 72) else 0)


def test_in_bfloat16_they_differ_by_rounding_alone(tiny_model_folder: Path) -> None:
    model = load_model(tiny_model_folder, device="cpu", dtype="bfloat16")
    expected = _predict(model, 3, 64, 64)
    assert prepare_unet(model)
    assert_close(_predict(model, 3, 64, 64), expected, atol=0.03 * float(expected.std()), rtol=0)


def test_a_size_that_can_not_be_generated_is_named(tiny_model_folder: Path) -> None:
    model = load_model(tiny_model_folder, device="cpu", dtype="float32")
    with pytest.raises(ConfigurationError, match="a size to warm up is 60x64: both sides"):
        prepare_unet(model, [(64, 60)])


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
    model = load_model(tiny_model_folder, device="cpu", dtype="float32")
    convolution = model.unet.conv_in
    convolution.register_forward_hook(lambda _, inputs, output: output * len(inputs[0]))
    expected = _predict(model, 5, 64, 64)
    assert not prepare_unet(model)
    assert torch.equal(_predict(model, 5, 64, 64), expected)
