"""The bookkeeping of `bench fidelity`, and its ways to draw on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.drawing import Case, Drawing, Studio, anywhere
from bench.fidelity import CELLS, _read, choose_prompts, summarise
from services.unet_worker.families.loading import load_family
from services.vae_worker.model import load_decoder
from shared.guidance_skip import SKIP_LEVELS
from training.retrieval import load_references

REFERENCES = load_references(Path("models/emoji"))


def test_tuning_and_reporting_share_no_picture_and_no_prompt() -> None:
    halves = [choose_prompts(REFERENCES, 300, half=half) for half in (0, 1)]
    assert [len(half) for half in halves] == [300, 300]
    pictures, captions = ([{reference[i] for reference in half} for half in halves] for i in (0, 1))
    assert not pictures[0] & pictures[1]
    assert not captions[0] & captions[1]


def test_few_prompts_are_spread_over_the_references() -> None:
    pictures = [picture for picture, _ in choose_prompts(REFERENCES, 10, half=1)]
    assert max(pictures) > 400
    assert len(set(pictures)) == 10


def test_every_request_of_a_cell_is_another() -> None:
    for cell in CELLS:
        cases = cell.cases(REFERENCES, half=1, seed=0)
        assert len(set(cases)) == cell.num_prompts * cell.num_seeds


def _sample(level_db: float, drop_db: float | None = None) -> dict[str, Any]:
    measures = {"is_hit": True, "rows_saved": 0.3, "foreground_db": 1.0, "ssim": 1.0, "gmsd": 0.0}
    arms = {"full": {"is_hit": True}, "balanced": {**measures, "psnr_db": level_db}}
    if drop_db is not None:
        arms["balanced_drop"] = {**measures, "is_hit": False, "psnr_db": drop_db}
    return {"arms": arms}


def test_a_baseline_is_compared_on_the_requests_it_has_drawn() -> None:
    summary = summarise([_sample(30.0, 20.0), _sample(50.0)])
    assert summary["balanced"]["psnr_mean_db"] == 40.0
    assert summary["balanced_drop"]["below_level_db"] == 10.0
    assert summary["balanced_drop"]["retrieval_delta"] == -1.0


def test_a_sample_that_was_cut_short_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "cell.jsonl"
    path.write_text(json.dumps({"seed": 0}) + "\n" + json.dumps(_sample(1.0)) + '\n{"case": {"ca')
    header, samples = _read(path)
    assert header == {"seed": 0}
    assert len(samples) == 1


@pytest.fixture(scope="module")
def studio(tiny_model_folder: Path) -> Studio:
    folder = tiny_model_folder
    balanced = SKIP_LEVELS["balanced"]
    assert balanced is not None
    return Studio(
        load_family(folder, device="cpu", dtype="float32"),
        load_decoder(folder, device="cpu", dtype="float32"),
        folder,
        {**SKIP_LEVELS, "anywhere": anywhere(balanced)},
    )


def test_steps_are_skipped_where_asked_and_guidance_is_dropped_where_told(studio: Studio) -> None:
    case = Case(caption="a red cat", picture=0, seed=1, num_inference_steps=6)
    full, same, skipped, dropped, unguided = studio.denoise(
        [
            Drawing(case=case),
            Drawing(case=case, unguided_from=6),
            Drawing(case=case, level="anywhere", skips=frozenset({3, 4})),
            Drawing(case=case, unguided_from=3),
            Drawing(case=case, unguided_from=0),
        ]
    )
    assert skipped.skipped_steps == (3, 4)
    assert full.skipped_steps == dropped.skipped_steps == ()
    torch.testing.assert_close(same.latents, full.latents)
    assert not torch.equal(skipped.latents, full.latents)
    distances = [float((drawn.latents - full.latents).norm()) for drawn in (dropped, unguided)]
    assert 0 < distances[0] < distances[1]


def test_pictures_have_the_models_size_and_range(studio: Studio) -> None:
    case = Case(caption="a red cat", picture=0, seed=1, num_inference_steps=1)
    (finished,) = studio.denoise([Drawing(case=case)])
    pictures = studio.decode([finished.latents] * 9)
    assert pictures.shape[:2] == (9, 3)
    assert 0 <= pictures.min() <= pictures.max() <= 1
