"""The measures of a picture's distance, against what their formulas say by hand."""

from __future__ import annotations

import pytest
import torch

from bench.picture_metrics import MAX_PSNR_DB, foreground_psnr_db, gmsd, psnr_db, ssim


def _pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_equal_pictures_are_as_near_as_can_be() -> None:
    pictures = _pictures()
    assert psnr_db(pictures, pictures).tolist() == [MAX_PSNR_DB] * 2
    assert foreground_psnr_db(pictures, pictures).tolist() == [MAX_PSNR_DB] * 2
    torch.testing.assert_close(ssim(pictures, pictures), torch.ones(2))
    torch.testing.assert_close(gmsd(pictures, pictures), torch.zeros(2))


def test_an_error_of_a_tenth_everywhere_is_20_db() -> None:
    references = torch.full((1, 3, 16, 16), 0.5)
    assert psnr_db(references + 0.1, references).item() == pytest.approx(20.0, abs=1e-3)


def test_a_white_background_does_not_count_as_foreground() -> None:
    references = torch.ones(1, 3, 16, 16)
    references[..., :8] = 0.5
    pictures = references.clone()
    pictures[..., :8] += 0.1
    assert psnr_db(pictures, references).item() == pytest.approx(23.01, abs=0.01)
    assert foreground_psnr_db(pictures, references).item() == pytest.approx(20.0, abs=1e-3)


def test_what_is_drawn_on_the_background_counts() -> None:
    references = torch.ones(1, 3, 16, 16)
    pictures = references.clone()
    pictures[..., :4, :4] = 0.0
    assert foreground_psnr_db(pictures, references).item() == pytest.approx(0.0, abs=1e-3)


def test_ssim_of_flat_pictures_compares_their_brightness_alone() -> None:
    references, pictures = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.25)
    expected = (2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4)
    assert ssim(pictures, references).item() == pytest.approx(expected, abs=1e-4)


def test_gmsd_does_not_mind_brightness_but_minds_lost_edges() -> None:
    references = _pictures() / 2
    assert gmsd(references + 0.25, references).max().item() < 1e-4
    flat = references.mean(dim=(2, 3), keepdim=True).expand_as(references)
    assert gmsd(flat, references).min().item() > 0.05
