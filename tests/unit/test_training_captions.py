from __future__ import annotations

import random
from collections import Counter

import pytest

from training.captions import DECORATIONS, P_EMPTY, caption_variant
from training.emoji_set import Emoji, load_emoji_set, parse_emoji_set

CAT = Emoji(
    characters="😺",
    name="grinning cat with a hat",
    synonyms=("happy cat",),
    category="faces",
)


def variants(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [caption_variant(CAT, rng) for _ in range(count)]


def test_the_empty_caption_comes_as_often_as_guidance_needs_it() -> None:
    share = variants(20_000).count("") / 20_000
    assert share == pytest.approx(P_EMPTY, abs=0.01)


def test_the_same_seed_gives_the_same_captions() -> None:
    assert variants(50, seed=3) == variants(50, seed=3)
    assert variants(50, seed=3) != variants(50, seed=4)


def test_name_synonym_article_and_decoration_all_occur() -> None:
    seen = Counter(variants(5_000))
    assert seen["grinning cat with a hat"] > 500
    assert seen["happy cat"] > 500
    assert seen["a happy cat"] > 20
    assert seen["the grinning cat with a hat"] > 20
    assert any(seen[decoration.format("happy cat")] for decoration in DECORATIONS)


def test_small_words_are_dropped_now_and_then_but_never_the_whole_caption() -> None:
    captions = variants(5_000)
    assert "grinning cat hat" in captions
    of_small_words = Emoji(characters="x", name="the of", synonyms=(), category="")
    rng = random.Random(0)
    drawn = [caption_variant(of_small_words, rng) for _ in range(2_000)]
    assert all(drawn.count(caption) for caption in ("the of", ""))
    assert drawn.count("") / 2_000 == pytest.approx(P_EMPTY, abs=0.03)


def test_the_embedded_set_is_large_and_its_names_are_its_own() -> None:
    emoji_set = load_emoji_set()
    assert len(emoji_set) >= 500
    assert len({emoji.name for emoji in emoji_set}) == len(emoji_set)
    assert all(caption == caption.lower() for emoji in emoji_set for caption in emoji.captions)


def test_headings_open_categories_and_synonyms_are_split() -> None:
    (apple, dog) = parse_emoji_set("# food\n🍎 red apple; apple\n\n# animals\n🐕 dog\n")
    assert (apple.name, apple.synonyms, apple.category) == ("red apple", ("apple",), "food")
    assert (dog.captions, dog.category) == (("dog",), "animals")


@pytest.mark.parametrize("text", ["🍎 apple\n🍏 apple\n", "🍎 apple\n🍎 red apple\n"])
def test_a_caption_or_a_picture_that_stands_twice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"line 2: .* stands twice"):
        parse_emoji_set(text)


def test_a_picture_without_a_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="line 1: 🍎 has no caption"):
        parse_emoji_set("🍎\n")
