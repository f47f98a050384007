"""Which picture is it? Nearest neighbour among small references, near-duplicates as one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

REFERENCE_SIZE = 32
NEAR_DUPLICATE_RMSE = 0.04  # of pixel values in [0, 1]
SPRITE_COLUMNS = 24
SPRITE_FILE = "references.png"
CAPTIONS_FILE = "references.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """Small pictures (N, 3, 32, 32) in [0, 1] with their captions, the name first."""

    characters: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    pictures: Tensor

    def groups(self) -> list[int]:
        """Return each picture's group: pictures closer than `NEAR_DUPLICATE_RMSE` share one."""
        distances = rmse(self.pictures, self.pictures)
        group = list(range(len(self.pictures)))
        for i, j in (distances < NEAR_DUPLICATE_RMSE).nonzero().tolist():
            old, new = group[i], group[j]
            if old != new:
                group = [new if number == old else number for number in group]
        return group

    def nearest(self, pictures: Tensor) -> list[int]:
        """Return the index of the reference nearest (L2) to each of `pictures` (M, 3, 32, 32)."""
        indices: list[int] = rmse(pictures, self.pictures).argmin(dim=1).tolist()
        return indices

    def save(self, folder: Path) -> None:
        """Write a sprite and a caption file that `load_references` reads."""
        rows = -(-len(self.pictures) // SPRITE_COLUMNS)
        size = REFERENCE_SIZE
        sprite = Image.new("RGB", (SPRITE_COLUMNS * size, rows * size), (255, 255, 255))
        for index, picture in enumerate(self.pictures):
            row, column = divmod(index, SPRITE_COLUMNS)
            pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
            sprite.paste(Image.fromarray(pixels), (column * size, row * size))
        sprite.save(folder / SPRITE_FILE, optimize=True)
        rows_of_text = [
            json.dumps({"emoji": emoji, "captions": captions}, ensure_ascii=False)
            for emoji, captions in zip(self.characters, self.captions, strict=True)
        ]
        text = "[\n" + ",\n".join(rows_of_text) + "\n]\n"
        (folder / CAPTIONS_FILE).write_text(text, encoding="utf-8")


def load_references(folder: Path) -> References:
    """Return the references that lie beside a model."""
    entries = json.loads((folder / CAPTIONS_FILE).read_text(encoding="utf-8"))
    sprite = Image.open(folder / SPRITE_FILE).convert("RGB")
    pictures = []
    for index in range(len(entries)):
        row, column = divmod(index, SPRITE_COLUMNS)
        left, top = column * REFERENCE_SIZE, row * REFERENCE_SIZE
        box = (left, top, left + REFERENCE_SIZE, top + REFERENCE_SIZE)
        pictures.append(np.asarray(sprite.crop(box)))
    return References(
        characters=tuple(entry["emoji"] for entry in entries),
        captions=tuple(tuple(entry["captions"]) for entry in entries),
        pictures=torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255,
    )


def shrink(picture: Image.Image) -> Tensor:
    """Return `picture` as (3, 32, 32) in [0, 1], each pixel the mean of what it covers."""
    small = picture.convert("RGB").resize((REFERENCE_SIZE,) * 2, Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


def rmse(left: Tensor, right: Tensor) -> Tensor:
    """Return the RMS difference of each of `left` (M, ...) to each of `right` (N, ...)."""
    scale: float = left[0].numel() ** 0.5
    return torch.cdist(left.flatten(1), right.flatten(1)) / scale
