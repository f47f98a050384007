"""Words that a model has never seen are named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from image_parameters import PARAMETERS

from services.unet_worker.families.loading import load_family
from services.unet_worker.families.vocabulary import Vocabulary, read_vocabulary, unknown_words
from shared.errors import ConfigurationError
from training.captions import DECORATIONS
from training.emoji_set import character_forms, load_emoji_set

VOCABULARY = Vocabulary(
    words=frozenset({"a", "red", "apple", "teacher", "flag", "of", "türkiye", "1"}),
    characters=frozenset({"🍎", "❤", "🏳‍🌈", "🇫🇷", "👍"}),
)


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red apple", ()),
        ("", ()),
        ("A RED Apple, a (red) apple!", ()),
        ("the teacher's apple", ("the",)),
        ("a zebra, a red zebra on a Moon", ("zebra", "on", "moon")),
        ("flag of tu\u0308rkiye", ()),
        ("apple 1 2", ("2",)),
        ("red_apple blue-apple", ("blue",)),
        ("🍎 a 🍎️ 🍎🍎", ()),
        ("❤ ❤️ ❤️🍎", ()),
        ("🏳️‍🌈 🏳‍🌈 🇫🇷", ()),
        ("🍎🦖🍎 🇫🇷🇩🇪", ("🦖", "🇩🇪")),
        ("👩‍🚒apple", ("👩‍🚒",)),
        ("👍🏽", ("👍🏽",)),
        ("猫 apple", ("猫",)),
    ],
)
def test_unknown_words_and_emoji_are_named_once_in_order(
    prompt: str, unknown: tuple[str, ...]
) -> None:
    assert unknown_words(prompt, VOCABULARY) == unknown


def test_a_folder_without_the_file_says_nothing_of_words(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff",
        b'{"words": ["a"]}',
        b'{"words": 3, "characters": []}',
        b'{"words": [1], "characters": []}',
        b'{"words": ["a"], "characters": "abc"}',
    ],
)
def test_a_vocabulary_that_is_none_ends_the_start_with_its_path(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "words.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"words\.json should hold the lists"):
        read_vocabulary(tmp_path)


def test_a_request_is_warned_of_the_unknown_words_of_the_prompts_that_count(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    words = {"words": ["red", "cat"], "characters": []}
    (folder / "words.json").write_text(json.dumps(words))
    family = load_family(folder, device="cpu", dtype="float32")

    def warnings(**changes: object) -> tuple[str, ...]:
        return family.encode(replace(PARAMETERS, **changes)).warnings  # type: ignore[arg-type]

    assert warnings(prompt="red cat") == ()
    assert warnings(prompt="red zebra", negative_prompt="cat dog") == (
        "prompt: the model has never seen 'zebra'",
        "negative_prompt: the model has never seen 'dog'",
    )
    assert warnings(prompt="cat", negative_prompt="dog", guidance_scale=1.0) == ()
    many = " ".join(f"{letter}x" for letter in "abcdefghij")
    assert warnings(prompt=many)[-1].endswith("'hx' and 2 more")


def test_the_embedded_model_knows_its_own_captions_and_characters() -> None:
    vocabulary = read_vocabulary(Path("models/emoji"))
    assert vocabulary is not None
    prompts = [caption for emoji in load_emoji_set() for caption in emoji.captions]
    prompts += [form for emoji in load_emoji_set() for form in character_forms(emoji.characters)]
    prompts += [decoration.format("apple") for decoration in DECORATIONS]
    assert [words for prompt in prompts if (words := unknown_words(prompt, vocabulary))] == []
    assert unknown_words("a zebra and a 🫎 in xylophones", vocabulary) == ("🫎", "xylophones")
