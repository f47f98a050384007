"""What a model folder says about itself, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import make_tiny_model

from services.unet_worker.model import choose_device, choose_dtype, load_model
from shared.errors import ConfigurationError

torch.set_num_threads(1)


def test_the_facts_are_the_folders_own(tmp_path: Path) -> None:
    folder = make_tiny_model(
        tmp_path,
        prediction_type="v_prediction",
        vae_scale_factor=4,
        latent_channels=8,
        sample_size=12,
        use_linear_projection=True,
    )
    facts = load_model(folder, device="cpu", dtype="float32").facts
    assert facts.latent_channels == 8
    assert facts.vae_scale_factor == 4
    assert (facts.default_height, facts.default_width) == (48, 48)
    assert facts.side_multiple == 8
    assert facts.max_tokens == 16
    assert facts.prediction_type == "v_prediction"


def test_the_vae_is_not_loaded(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    for weights in (folder / "vae").glob("*.safetensors"):
        weights.unlink()
    model = load_model(folder, device="cpu", dtype="bfloat16")
    assert model.pipeline.vae is None
    assert model.unet.dtype == model.dtype == torch.bfloat16


def _change(folder: Path, file: str, **fields: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("file", "fields", "complaint"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ("unet/config.json", {"class_embed_type": "identity"}, "class_embed_type"),
        ("vae/config.json", {"latent_channels": 16}, "latent channels, 16"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 77}, "model_max_length=77"),
        ("unet/config.json", {"cross_attention_dim": 33}, "can't be loaded"),
    ],
)
def test_a_folder_that_is_wrong_is_refused_with_the_reason(
    tiny_model_folder: Path, tmp_path: Path, file: str, fields: dict[str, Any], complaint: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    _change(folder, file, **fields)
    with pytest.raises(ConfigurationError, match=complaint):
        load_model(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("part", ["model_index.json", "vae/config.json", "unet/config.json"])
def test_a_missing_part_is_named(tiny_model_folder: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / part).unlink()
    with pytest.raises(ConfigurationError, match=part.split("/", maxsplit=1)[0]):
        load_model(folder, device="cpu", dtype="float32")


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"/nowhere/model_index\.json is missing"):
        load_model("/nowhere")


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        choose_device(name)


def test_dtypes_have_their_names() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("float16", cpu) == torch.float16
    assert choose_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(ConfigurationError, match="float64"):
        choose_dtype("float64", cpu)  # type: ignore[arg-type]
