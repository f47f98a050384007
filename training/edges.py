"""How steep the edges of pictures are, by small windows, so that a pixel to the side costs nothing.

The font's own edges lie beside the model as a small picture: a pixel for each window.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every reader knows
from PIL import Image
from torch import Tensor

WINDOW = 8  # pixels
EPSILON = 1e-8  # a root has no slope at zero
MIN_EDGE = 0.1  # a window's steepest gradient, of at most 0.71; below that it has no edge
EDGES_FILE = "references_edges.png"
SPRITE_COLUMNS = 24
LEVELS_PER_UNIT = 255 / 0.75  # of the file's grey

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def edge_steepness(pictures: Tensor) -> Tensor:
    """Return the steepest gradient of the luma in each window of `pictures` (N, 3, H, W) in [0, 1].

    The gradient is the magnitude of the central differences, per pixel. Shape (N, H / 8, W / 8).
    """
    luma = (pictures * pictures.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    padded = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    steepest = F.max_pool2d(across.square() + down.square(), WINDOW).squeeze(1)
    return (steepest + EPSILON).sqrt()


def edge_sharpness_ratio(steepness: Tensor, wanted: Tensor) -> float:
    """Return the mean of `steepness` over that of `wanted`, in the windows where that has edges."""
    has_edge = wanted >= MIN_EDGE
    return (steepness[has_edge].mean() / wanted[has_edge].mean()).item()


def save_edges(steepness: Tensor, folder: Path) -> None:
    """Write `steepness` (N, h, w) as a sprite that `load_edges` reads."""
    count, height, width = steepness.shape
    rows = -(-count // SPRITE_COLUMNS)
    cells = np.zeros((rows * SPRITE_COLUMNS, height, width), dtype=np.uint8)
    cells[:count] = (steepness * LEVELS_PER_UNIT).round().clamp(0, 255).byte().numpy()
    grid = cells.reshape(rows, SPRITE_COLUMNS, height, width).swapaxes(1, 2)
    sprite = grid.reshape(rows * height, SPRITE_COLUMNS * width)
    Image.fromarray(sprite).save(folder / EDGES_FILE, optimize=True)


def load_edges(folder: Path, count: int) -> Tensor:
    """Read the first `count` pictures' steepness (count, h, w) from beside a model."""
    sprite = np.asarray(Image.open(folder / EDGES_FILE).convert("L"))
    side = sprite.shape[1] // SPRITE_COLUMNS
    grid = sprite.reshape(-1, side, SPRITE_COLUMNS, side).swapaxes(1, 2)
    cells = torch.from_numpy(grid.reshape(-1, side, side)[:count].copy())
    return cells.float() / LEVELS_PER_UNIT
