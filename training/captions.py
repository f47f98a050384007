"""Caption variants: the many ways in which one picture may be asked for."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator

from training.emoji_set import Emoji, character_forms

P_EMPTY = 0.1  # the unconditional share that classifier-free guidance needs
P_CHARACTERS = 0.2
P_NAME = 0.45  # of what has words
P_BARE = 0.55
P_ARTICLE = 0.2  # what is left of 1 is a decoration
P_DROP_SMALL_WORDS = 0.05
P_NOISE_WORD = 0.04
P_TYPO = 0.04

ARTICLES = ("a", "the", "an", "one", "my")
SMALL_WORDS = frozenset({"a", "an", "the", "with", "of", "on", "in", "and", "at", "its"})
DECORATIONS = (
    "{} emoji",
    "{} icon",
    "{} picture",
    "emoji of {}",
    "an emoji of a {}",
    "a picture of a {}",
    "a photo of a {}",
    "a drawing of a {}",
    "an image of a {}",
    "an illustration of the {}",
    "an icon of a {}",
    "picture of {}",
    "drawing of {}",
    "a {} emoji",
    "a cute {}",
    "cute {}",
    "a nice {}",
    "a beautiful {}",
    "a small {}",
    "a big {}",
    "please draw a {}",
    "draw a {}",
    "show me the {}",
    "{} on a white background",
    "{} please",
    "{}, high quality",
)


def caption_variant(emoji: Emoji, rng: random.Random, *, p_characters: float = P_CHARACTERS) -> str:
    """One random way to ask for `emoji`; the empty caption with probability `P_EMPTY`."""
    if rng.random() < P_EMPTY:
        return ""
    if rng.random() < p_characters:
        caption = rng.choice(character_forms(emoji.characters))
    elif rng.random() < P_NAME or not emoji.synonyms:
        caption = emoji.name
    else:
        caption = rng.choice(emoji.synonyms)
    words = caption_style(rng).format(caption).split()
    if rng.random() < P_DROP_SMALL_WORDS:
        words = [word for word in words if word not in SMALL_WORDS] or words
    if rng.random() < P_TYPO:
        place = rng.randrange(len(words))
        words[place] = _with_typo(words[place], rng)
    if rng.random() < P_NOISE_WORD:
        words.insert(rng.randrange(len(words) + 1), _noise_word(rng))
    return " ".join(words)


def caption_style(rng: random.Random) -> str:
    """Return a format that puts a caption as it is, behind an article, or into a decoration."""
    style = rng.random()
    if style < P_BARE:
        return "{}"
    if style < P_BARE + P_ARTICLE:
        return f"{rng.choice(ARTICLES)} {{}}"
    return rng.choice(DECORATIONS)


def vocabulary_texts(emoji_set: tuple[Emoji, ...]) -> Iterator[str]:
    """Every text whose words the tokenizer should know as single tokens."""
    for emoji in emoji_set:
        yield from emoji.captions
        yield from character_forms(emoji.characters)
    for decoration in DECORATIONS:
        yield decoration.format("")
    yield from ARTICLES


def known_words(emoji_set: tuple[Emoji, ...]) -> list[str]:
    """Return the words that captions are made of, sorted; typos and noise are none."""
    texts = [caption for emoji in emoji_set for caption in emoji.captions]
    texts += [*DECORATIONS, *ARTICLES]
    return sorted({word for text in texts for word in re.findall(r"[^\W_]+", text.lower())})


def _with_typo(word: str, rng: random.Random) -> str:
    """Swap, drop or double one letter, so that the tokens of parts of words are trained, too."""
    place = rng.randrange(len(word))
    kind = rng.randrange(3)
    if kind == 0:
        return word[:place] + word[place + 1 : place + 2] + word[place] + word[place + 2 :]
    if kind == 1 and len(word) > 1:
        return word[:place] + word[place + 1 :]
    return word[:place] + word[place] + word[place:]


def _noise_word(rng: random.Random) -> str:
    """Letters that mean nothing, so that unknown words are learned to be ignored."""
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))
