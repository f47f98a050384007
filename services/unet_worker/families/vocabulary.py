"""Which words a model has learned, and which of a prompt's it has not.

A model of few words, such as the embedded one, says so by a `words.json` in its folder; most models
have none, and nothing is said of their prompts.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError

WORDS_FILE = "words.json"
MAX_WORDS_NAMED = 8

_SILENT = frozenset(
    ("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Zs", "Zl", "Zp", "Mn", "Me", "Cc", "Cf")
)
_VARIATION_SELECTOR = "\N{VARIATION SELECTOR-16}"
_EXTENDER = r"[\ufe0e\ufe0f\u20e3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]"
_PIECES = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)\b"  # CLIP cuts these off; they say nothing by themselves
    r"|(?P<word>[^\W_]+)"
    r"|(?P<symbol>[\U0001f1e6-\U0001f1ff]{2}"  # a flag is two letters of its own
    rf"|[^\w\s]{_EXTENDER}*(?:\u200d[^\w\s]{_EXTENDER}*)*)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a model has learned: lower-case words, and emoji without variation selectors."""

    words: frozenset[str]
    characters: frozenset[str]

    def knows(self, piece: str) -> bool:
        """Return whether `piece`, a word or an emoji, has been learned; punctuation is no word."""
        if piece in self.words or piece.replace(_VARIATION_SELECTOR, "") in self.characters:
            return True
        # What Unicode has not assigned yet is a newer emoji.
        return all(unicodedata.category(character) in _SILENT for character in piece)


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Return the vocabulary that lies in a model's folder, None where there is none.

    Raises:
        ConfigurationError: The file is not two lists of strings, `words` and `characters`.
    """
    path = folder / WORDS_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Vocabulary(
            words=frozenset(word.lower() for word in _listed(content, "words")),
            characters=frozenset(
                piece.replace(_VARIATION_SELECTOR, "") for piece in _listed(content, "characters")
            ),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} should hold the lists of strings 'words' and 'characters': {error!r}"
        ) from error


def _listed(content: Any, name: str) -> list[Any]:
    """Return the list `name` of a vocabulary file; TypeError or KeyError where it has none."""
    found = content[name]
    if not isinstance(found, list):
        raise TypeError(f"'{name}' is {found!r}")
    return found


def unknown_words(prompt: str, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return the words and emoji of `prompt` that have not been learned, each once, in order."""
    text = unicodedata.normalize("NFC", prompt).lower()
    pieces = [match["word"] or match["symbol"] for match in _PIECES.finditer(text)]
    return tuple(dict.fromkeys(piece for piece in pieces if piece and not vocabulary.knows(piece)))


def unknown_word_warnings(prompts: Mapping[str, str], vocabulary: Vocabulary | None) -> list[str]:
    """Return a warning for each prompt, by its name, that has unknown words."""
    if vocabulary is None:
        return []
    unknown = {name: unknown_words(prompt, vocabulary) for name, prompt in prompts.items()}
    return [
        f"{name}: the model has never seen {_in_words(words)}"
        for name, words in unknown.items()
        if words
    ]


def _in_words(words: tuple[str, ...]) -> str:
    named = ", ".join(repr(word) for word in words[:MAX_WORDS_NAMED])
    rest = len(words) - MAX_WORDS_NAMED
    return f"{named} and {rest} more" if rest > 0 else named
