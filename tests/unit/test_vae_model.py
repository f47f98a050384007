"""Which VAEs are loaded, and in which dtype."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import finish, make_latents, make_tiny_vae, whole_decode

from services.vae_worker.decoding import Granularity, decode_chunks, plan_chunks
from services.vae_worker.model import load_decoder
from shared.latents_format import LatentsFormat
from shared.model_folder import check_model_folder


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    return folder


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder_with_a_tiny_vae_is_served(folder: Path) -> None:
    vae = make_tiny_vae()
    shutil.rmtree(folder / "vae")
    vae.save_pretrained(folder / "vae")
    change(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    check_model_folder(folder)
    decoder = load_decoder(folder, device="cpu", dtype="float32")
    assert decoder.latents_format == LatentsFormat(
        channels=4, vae_scale_factor=4, scaling_factor=1.0, shift_factor=0.0, needs_float32=False
    )
    latents = make_latents(vae, 5, 6)
    plan = plan_chunks(decoder.vae, 5, 6, granularity=Granularity(num_chunks=3))
    image = finish(decode_chunks(decoder.vae, latents, plan=plan))
    assert torch.equal(image, whole_decode(vae, latents))


def test_a_vae_whose_files_are_a_variant_is_loaded(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert load_decoder(folder, device="cpu", dtype="float32").dtype is torch.float32


@pytest.mark.parametrize(
    ("force_upcast", "dtype", "expected"),
    [
        (True, "float16", torch.float32),
        (True, "bfloat16", torch.bfloat16),
        (False, "float16", torch.float16),
    ],
)
def test_a_vae_that_overflows_in_float16_computes_in_float32(
    folder: Path, force_upcast: bool, dtype: Any, expected: torch.dtype
) -> None:
    change(folder / "vae" / "config.json", force_upcast=force_upcast)
    decoder = load_decoder(folder, device="cpu", dtype=dtype)
    assert decoder.dtype is expected
    assert {parameter.dtype for parameter in decoder.vae.decoder.parameters()} == {expected}
