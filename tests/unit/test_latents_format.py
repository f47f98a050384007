"""What a VAE's configuration says about latents, and what follows for the VAE worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from shared.latents_format import LatentsFormat, read_latents_format

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def _folder(path: Path, **config: Any) -> Path:
    (path / "vae").mkdir(parents=True)
    (path / "vae" / "config.json").write_text(json.dumps(config))
    return path


def test_what_a_configuration_leaves_out_is_what_diffusers_takes_for_it(tmp_path: Path) -> None:
    found = read_latents_format(_folder(tmp_path, block_out_channels=[1, 2, 3, 4]))
    assert found == LatentsFormat(
        channels=4,
        vae_scale_factor=8,
        scaling_factor=0.18215,
        shift_factor=0.0,
        needs_float32=False,
    )


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
