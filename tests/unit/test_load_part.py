"""Weights that are not all there, or no numbers, are never served."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.unet_worker.model import load_model
from services.vae_worker.model import load_decoder
from shared.errors import ConfigurationError

Weights = dict[str, torch.Tensor]
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    return folder


def load(folder: Path, part: str, dtype: str = "float32") -> None:
    loader = load_decoder if part == "vae" else load_model
    loader(folder, device="cpu", dtype=dtype)  # type: ignore[operator]


def change(folder: Path, part: str, make: Callable[[Weights], Weights]) -> None:
    path = folder / part / FILES[part]
    save_file(make(load_file(path)), path, metadata={"format": "pt"})


def last_matrix(weights: Weights) -> str:
    """A weight that is used in decoding as in denoising."""
    return max(name for name, one in weights.items() if one.ndim > 1 and "encoder.down" not in name)


@pytest.mark.parametrize("part", list(FILES))
def test_weights_that_are_missing_are_named(folder: Path, part: str) -> None:
    name = last_matrix(load_file(folder / part / FILES[part]))
    change(folder, part, lambda weights: {k: v for k, v in weights.items() if k != name})
    with pytest.raises(ConfigurationError, match="lacks weights"):
        load(folder, part)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_belong_nowhere_are_named(folder: Path, part: str) -> None:
    change(folder, part, lambda weights: weights | {"down_blocks.9.weight": torch.zeros(1)})
    with pytest.raises(ConfigurationError, match=r"knows nothing of: down_blocks\.9\.weight"):
        load(folder, part)


@pytest.mark.parametrize("part", list(FILES))
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(folder: Path, part: str, number: float) -> None:
    def spoil(weights: Weights) -> Weights:
        weights[last_matrix(weights)].view(-1)[-1] = number
        return weights

    change(folder, part, spoil)
    with pytest.raises(ConfigurationError, match="no finite numbers"):
        load(folder, part)


def test_numbers_that_a_dtype_has_no_room_for_are_named(folder: Path) -> None:
    def enlarge(weights: Weights) -> Weights:
        weights[last_matrix(weights)].view(-1)[-1] = 1e5
        return weights

    change(folder, "unet", enlarge)
    load(folder, "unet")
    with pytest.raises(ConfigurationError, match=r"no finite numbers in torch\.float16"):
        load(folder, "unet", "float16")


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_variant_is_loaded_where_there_is_nothing_else(folder: Path, variant: str) -> None:
    for part, file in FILES.items():
        path = folder / part / file
        path.rename(path.with_suffix(f".{variant}.safetensors"))
    load(folder, "unet")
    load(folder, "vae")
