"""The pictures the embedded model knows, read from `emoji_set.txt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

EMOJI_SET_FILE = Path(__file__).with_name("emoji_set.txt")
VARIATION_SELECTOR = "\N{VARIATION SELECTOR-16}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Emoji:
    """One picture: the characters that draw it, its unique name, and its synonyms."""

    characters: str
    name: str
    synonyms: tuple[str, ...]
    category: str

    @property
    def captions(self) -> tuple[str, ...]:
        """The name, then the synonyms."""
        return (self.name, *self.synonyms)


def parse_emoji_set(text: str) -> tuple[Emoji, ...]:
    """Parse lines of `emoji name; synonym; ...`; `# heading` opens a category.

    Raises:
        ValueError: a line without captions, or an emoji or a caption that stands twice.

    """
    emoji: list[Emoji] = []
    seen: set[str] = set()
    category = ""
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if line.startswith("#"):
            category = line.lstrip("# ")
            continue
        if not line:
            continue
        characters, _, rest = line.partition(" ")
        captions = tuple(caption.strip() for caption in rest.split(";") if caption.strip())
        if not captions:
            raise ValueError(f"line {number}: {characters} has no caption")
        for word in (characters, *captions):
            if word in seen:
                raise ValueError(f"line {number}: {word!r} stands twice")
            seen.add(word)
        emoji.append(
            Emoji(
                characters=characters,
                name=captions[0],
                synonyms=captions[1:],
                category=category,
            )
        )
    return tuple(emoji)


def character_forms(characters: str) -> tuple[str, ...]:
    """Return the ways in which an emoji is typed: as it is, and without or with its selector.

    Keyboards and web pages differ in whether they write the variation selector.
    """
    forms = [characters, characters.replace(VARIATION_SELECTOR, "")]
    if len(characters) == 1:
        forms.append(characters + VARIATION_SELECTOR)
    return tuple(dict.fromkeys(forms))


def load_emoji_set(path: Path = EMOJI_SET_FILE) -> tuple[Emoji, ...]:
    """Read the embedded model's own list of pictures."""
    return parse_emoji_set(path.read_text(encoding="utf-8"))
