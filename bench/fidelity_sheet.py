"""The contact sheet of `bench fidelity`: full guidance, each level, and what differs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bench.drawing import Case, Drawing
from bench.fidelity_samples import LEVELS, open_studio
from training.contact_sheet import save_contact_sheet

NUM_CASES = 12
DIFFERENCE_GAIN = 4
"""Differences are shown so many times larger, around grey."""


def save_sheet(cases: Sequence[Case], path: Path) -> None:
    """Draw some of the cases, evenly spread, one in a row, to a PNG."""
    chosen = cases[:: max(len(cases) // NUM_CASES, 1)][:NUM_CASES]
    studio = open_studio()
    ways = ("off", *LEVELS)
    drawings = [Drawing(case=case, level=level) for level in ways for case in chosen]
    pictures = studio.decode([drawn.latents for drawn in studio.denoise(drawings)])
    by_way = dict(zip(ways, torch.tensor_split(pictures, len(ways)), strict=True))
    images: list[Image.Image] = []
    captions: list[str] = []
    for i, case in enumerate(chosen):
        full = by_way["off"][i]
        images.append(_image(full))
        captions.append(case.caption)
        for level in LEVELS:
            difference = (by_way[level][i] - full) * DIFFERENCE_GAIN + 0.5
            images += [_image(by_way[level][i]), _image(difference.clamp(0, 1))]
            captions += [level, f"{level} - full, x{DIFFERENCE_GAIN}"]
    save_contact_sheet(images, captions, path, columns=1 + 2 * len(LEVELS))


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
