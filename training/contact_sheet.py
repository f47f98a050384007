"""A sheet of generated pictures with their captions, for the docs and for one's own eyes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SHOWCASE = (
    "grinning face",
    "face with tears of joy",
    "cool face",
    "crying face",
    "robot",
    "ghost",
    "a happy cat",
    "red heart",
    "broken heart",
    "thumbs up",
    "waving hand",
    "santa claus",
    "dog face",
    "cat face",
    "fox",
    "panda",
    "frog",
    "penguin",
    "unicorn",
    "lion",
    "octopus",
    "butterfly",
    "rose",
    "sunflower",
    "palm tree",
    "cactus",
    "an apple",
    "watermelon",
    "strawberry",
    "avocado",
    "pizza",
    "hamburger",
    "doughnut",
    "birthday cake",
    "a cup of coffee",
    "beer",
    "volcano",
    "a small house",
    "castle",
    "statue of liberty",
    "racing car",
    "rocket",
    "airplane",
    "sailboat",
    "bicycle",
    "steam train",
    "full moon",
    "rainbow",
    "fire",
    "snowman",
    "halloween pumpkin",
    "christmas tree",
    "birthday present",
    "soccer ball",
    "trophy",
    "guitar",
    "crown",
    "laptop",
    "light bulb",
    "books",
    "money bag",
    "flag of france",
    "japanese flag",
    "flag of canada",
)
CAPTION_HEIGHT = 18
CELL_MARGIN = 6


def contact_sheet(pictures: list[Image.Image], captions: list[str], *, columns: int) -> Image.Image:
    """Return `pictures` laid out in rows of `columns`, each above its caption."""
    width, height = pictures[0].size
    cell_width, cell_height = width + CELL_MARGIN, height + CELL_MARGIN + CAPTION_HEIGHT
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(index, columns)
        left, top = column * cell_width + CELL_MARGIN // 2, row * cell_height + CELL_MARGIN // 2
        sheet.paste(picture, (left, top))
        middle = left + width // 2
        draw.text((middle, top + height + 2), caption, fill=(60, 60, 60), font=font, anchor="ma")
    return sheet


def save_contact_sheet(
    pictures: list[Image.Image], captions: list[str], path: Path, *, columns: int = 8
) -> None:
    """Write `contact_sheet` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, captions, columns=columns).save(path, optimize=True)
