"""What a model folder says about itself, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from denoising import parameters
from tiny_model import make_tiny_model

from services.unet_worker.families.loading import load_family
from shared.device import choose_device, choose_dtype
from shared.errors import ConfigurationError


def test_the_facts_are_the_folders_own(tmp_path: Path) -> None:
    folder = make_tiny_model(
        tmp_path,
        prediction_type="v_prediction",
        vae_scale_factor=4,
        latent_channels=8,
        sample_size=12,
        use_linear_projection=True,
    )
    family = load_family(folder, device="cpu", dtype="float32")
    facts, latents = family.facts, family.latents_format
    assert (latents.channels, latents.vae_scale_factor) == (8, 4)
    assert (latents.scaling_factor, latents.shift_factor) == (0.18215, 0.0)
    assert (facts.default_height, facts.default_width) == (48, 48)
    assert facts.side_multiple == 8
    assert facts.max_prompt_tokens == 14
    assert family.conditions.keys() == {"prompt_embeds"}
    assert family.conditions["prompt_embeds"].shape == (16, 32)
    assert facts.prediction_type == "v_prediction"


def test_the_vae_is_not_loaded(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    for weights in (folder / "vae").glob("*.safetensors"):
        weights.unlink()
    family: Any = load_family(folder, device="cpu", dtype="bfloat16")
    assert family.pipeline.vae is None
    assert family.unet.dtype == family.dtype == torch.bfloat16


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
        load_family(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("part", ["model_index.json", "vae/config.json", "unet/config.json"])
def test_a_missing_part_is_named(tiny_model_folder: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / part).unlink()
    with pytest.raises(ConfigurationError, match=part.split("/", maxsplit=1)[0]):
        load_family(folder, device="cpu", dtype="float32")


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"/nowhere/model_index\.json is missing"):
        load_family("/nowhere")


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        choose_device(name)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_a_gpu_computes_in_bfloat16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_dtype("auto", torch.device("cuda")) == expected


def test_dtypes_have_their_names() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("float16", cpu) == torch.float16
    assert choose_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(ConfigurationError, match="float64"):
        choose_dtype("float64", cpu)  # type: ignore[arg-type]


def test_a_latent_consistency_folder_is_served_under_its_own_pipelines_class(
    tmp_path: Path,
) -> None:
    folder = make_tiny_model(tmp_path, time_cond_proj_dim=16, scheduler_class="LCMScheduler")
    _change(folder, "model_index.json", _class_name="LatentConsistencyModelPipeline")
    family = load_family(folder, device="cpu", dtype="float32")
    assert list(family.conditions) == ["prompt_embeds", "timestep_cond"]
    request = parameters(guidance_scale=8.0, negative_prompt="dog")
    assert not family.is_guided(request)
    pipeline = diffusers.LatentConsistencyModelPipeline.from_pretrained(
        folder, low_cpu_mem_usage=False
    )
    embedding = pipeline.get_guidance_scale_embedding(torch.tensor([7.0]), embedding_dim=16)
    torch.testing.assert_close(family.encode(request).positive["timestep_cond"], embedding[0])


def test_a_consistency_folder_whose_network_takes_no_scale_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, scheduler_class="LCMScheduler")
    _change(folder, "model_index.json", _class_name="LatentConsistencyModelPipeline")
    with pytest.raises(ConfigurationError, match="time_cond_proj_dim"):
        load_family(folder, device="cpu", dtype="float32")


def test_requests_share_a_batch_by_the_size_of_their_latents(tiny_model_folder: Path) -> None:
    family = load_family(tiny_model_folder, device="cpu", dtype="float32")
    key = family.batch_key(parameters(height=32, width=48))
    assert key == family.batch_key(parameters(height=32, width=48, prompt="else", seed=9))
    assert key != family.batch_key(parameters(height=48, width=32))


def test_every_condition_of_an_encoding_is_as_it_was_announced(tmp_path: Path) -> None:
    for name, settings in (("sd", {}), ("lcm", {"time_cond_proj_dim": 16})):
        folder = make_tiny_model(tmp_path / name, **settings)
        family = load_family(folder, device="cpu", dtype="bfloat16")
        encoding = family.encode(parameters())
        for side in (encoding.negative, encoding.positive):
            assert side.keys() == family.conditions.keys()
            for condition, spec in family.conditions.items():
                assert side[condition].shape == spec.shape
                assert side[condition].dtype == spec.dtype
