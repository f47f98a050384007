"""How finely decodes are cut: chosen by the profiler, told by a profile, overridden by settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scheduler_world import make_worker

from bench.profiler import choose_strip_fraction
from services.scheduler.devices.choice import profile_in_short
from services.scheduler.devices.profile_file import format_profile
from services.vae_worker.decoding import Granularity
from services.vae_worker.granularity import choose_granularity
from services.vae_worker.model import Decoder
from shared.errors import ConfigurationError
from shared.latents_format import LatentsFormat
from shared.profile_files import ChunkGranularity, find_granularity
from shared.settings import VaeWorkerSettings

PROFILE = profile_in_short(make_worker("unet", "u", "u-1"), ())
SIX = ChunkGranularity(num_chunks=6, max_strip_fraction=0.25)


def test_a_decoder_s_granularity_is_that_of_the_first_profile_of_its_model(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(format_profile(PROFILE))
    (tmp_path / "b.json").write_text(format_profile(replace(PROFILE, granularity=SIX)))

    def found(model_id: str = "m", device: str = "cpu") -> ChunkGranularity | None:
        return find_granularity(tmp_path, model_id=model_id, device=device, dtype="float32")

    assert found() == SIX
    assert found(model_id="other") is None
    assert found(device="cuda") is None
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ConfigurationError, match=r"c\.json"):
        found(model_id="other")


@pytest.mark.parametrize(
    ("longest_chunk", "chosen"),
    [(0.9, 0.0), (0.4, 0.25), (0.25, 0.1), (0.05, 0.1)],
    ids=["layers", "strips", "smaller strips", "nothing is short enough"],
)
def test_the_coarsest_cut_is_chosen_whose_longest_chunk_is_short_enough(
    longest_chunk: float, chosen: float
) -> None:
    decodes = {
        0.0: [(8.0, 2.0)] * 3,
        0.25: [(3.0, 3.1, 3.9)] * 3,
        0.1: [(2.0, 2.0, 2.0, 2.0, 2.1)] * 3,
    }
    assert choose_strip_fraction(decodes, longest_chunk=longest_chunk) == chosen


def test_a_finer_cut_is_chosen_where_it_is_faster() -> None:
    decodes = {0.0: [(4.0, 1.1)], 0.25: [(2.5, 2.5)]}
    assert choose_strip_fraction(decodes, longest_chunk=1.0) == 0.0
    decodes = {0.0: [(4.0, 4.0)], 0.25: [(2.5, 2.5)]}
    assert choose_strip_fraction(decodes, longest_chunk=1.0) == 0.25


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Granularity(num_chunks=6, max_strip_fraction=0.25)),
        ({"num_chunks": 3}, Granularity(num_chunks=3, max_strip_fraction=0.25)),
        ({"max_strip_fraction": 0.0}, Granularity(num_chunks=6)),
        ({"profiles": Path("nowhere")}, Granularity(num_chunks=4)),
    ],
)
def test_settings_override_the_profile(
    tmp_path: Path, settings: dict[str, object], expected: Granularity
) -> None:
    (tmp_path / "m.json").write_text(format_profile(replace(PROFILE, granularity=SIX)))
    decoder = Decoder(
        name="m",
        vae=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
        latents_format=LatentsFormat(channels=4, vae_scale_factor=8, scaling_factor=1.0),
        default_size=(8, 8),
    )
    read = VaeWorkerSettings.model_validate({"profiles": tmp_path, **settings})
    assert choose_granularity(read, decoder) == expected
