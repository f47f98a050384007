"""Renders the emoji with Google's Noto Color Emoji font: the training pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.emoji_set import Emoji

FONT_FILES = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf"),
)
BITMAP_SIZE = 109  # the one size at which the font holds its bitmaps
BITMAP_WIDTH = 136  # pixels; the bitmaps are 136x128
PICTURE_SIZE = 128
MARGIN = 4
WHITE = (255, 255, 255)


def find_font() -> Path:
    """Return where the font lies.

    Raises:
        FileNotFoundError: it is not installed.

    """
    for path in FONT_FILES:
        if path.exists():
            return path
    raise FileNotFoundError(
        "the font Noto Color Emoji is missing; on Debian: apt install fonts-noto-color-emoji"
    )


def render(characters: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return one emoji centred on white, 128x128 RGB.

    Raises:
        ValueError: the font has no picture for it.

    """
    canvas = Image.new("RGBA", (2 * BITMAP_WIDTH, 2 * BITMAP_WIDTH), (*WHITE, 0))
    ImageDraw.Draw(canvas).text((32, 32), characters, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font cannot draw {characters!r}")
    glyph = canvas.crop(box)
    square = Image.new("RGBA", (BITMAP_WIDTH, BITMAP_WIDTH), (*WHITE, 255))
    left, top = (BITMAP_WIDTH - glyph.width) // 2, (BITMAP_WIDTH - glyph.height) // 2
    square.alpha_composite(glyph, (max(left, 0), max(top, 0)))
    inner = PICTURE_SIZE - 2 * MARGIN
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), WHITE)
    picture.paste(
        square.convert("RGB").resize((inner, inner), Image.Resampling.LANCZOS), (MARGIN, MARGIN)
    )
    return picture


def render_all(emoji_set: tuple[Emoji, ...]) -> Tensor:
    """Return every emoji: (N, 3, 128, 128) uint8."""
    font = ImageFont.truetype(str(find_font()), BITMAP_SIZE)
    pixels = np.stack([np.asarray(render(emoji.characters, font)) for emoji in emoji_set])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def to_unit_range(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as floats in [-1, 1], which is what the VAE reads and writes."""
    return pixels.float() / 127.5 - 1
