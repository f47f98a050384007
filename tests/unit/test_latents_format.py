"""What a VAE's configuration says about latents, and what follows for the VAE worker."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from services.vae_worker.chunked_decoder import Granularity, decode_chunks, plan_chunks
from services.vae_worker.model import choose_vae_dtype, load_decoder
from shared.latents_format import LatentsFormat, read_latents_format

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def _folder(path: Path, **config: Any) -> Path:
    (path / "vae").mkdir(parents=True)
    (path / "vae" / "config.json").write_text(json.dumps(config))
    return path


def test_what_a_configuration_leaves_out_is_what_diffusers_takes_for_it(tmp_path: Path) -> None:
    found = read_latents_format(_folder(tmp_path, block_out_channels=[1, 2, 3, 4]))
    assert found == LatentsFormat(channels=4, vae_scale_factor=8, scaling_factor=0.18215)


def test_a_shift_and_a_wish_for_float32_are_read(tmp_path: Path) -> None:
    found = read_latents_format(
        _folder(
            tmp_path,
            latent_channels=16,
            block_out_channels=[1, 2],
            scaling_factor=0.36,
            shift_factor=0.1,
            force_upcast=True,
        )
    )
    assert (found.channels, found.vae_scale_factor, found.scaling_factor) == (16, 2, 0.36)
    assert (found.shift_factor, found.needs_float32) == (0.1, True)


def test_a_vae_that_overflows_in_float16_never_computes_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asks = LatentsFormat(channels=4, vae_scale_factor=8, scaling_factor=1.0, needs_float32=True)
    assert choose_vae_dtype("float16", CPU, asks) == torch.float32
    assert choose_vae_dtype("bfloat16", CPU, asks) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert choose_vae_dtype("auto", GPU, asks) == torch.float32
    assert choose_vae_dtype("auto", GPU, replace(asks, needs_float32=False)) == torch.bfloat16


def test_a_tiny_autoencoder_decodes_chunk_by_chunk_as_whole(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    shutil.rmtree(folder / "vae")
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)
    )
    vae.save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (folder / "model_index.json").write_text(json.dumps(index))
    decoder = load_decoder(folder, device="cpu", dtype="float32")
    assert decoder.scale_factor == 8
    latents = torch.randn(1, 4, 5, 7)
    plan = plan_chunks(decoder.vae, 5, 7, granularity=Granularity(num_chunks=3))
    chunks = decode_chunks(decoder.vae, latents, plan=plan)
    assert [next(chunks), next(chunks)] == [1, 2]
    with pytest.raises(StopIteration) as end:
        next(chunks)
    with torch.inference_mode():
        torch.testing.assert_close(end.value.value, vae.eval().decode(latents).sample)
