from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from training.tokenizer import (
    END_OF_WORD,
    MAX_TOKENS,
    build_vocabulary,
    learn_merges,
    train_tokenizer,
    word_counts,
)

TEXTS = ("a happy cat", "flag of türkiye", "the teacher's apple", "banana aaaa")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer"))


def test_every_known_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.tokenize("a happy cat") == [f"{w}{END_OF_WORD}" for w in ("a", "happy", "cat")]
    assert len(tokenizer.tokenize("banana aaaa türkiye")) == 3


def test_text_comes_back_whatever_its_words(tokenizer: CLIPTokenizer) -> None:
    for text in ("a happy cat", "zebra flag of türkiye"):
        tokens = tokenizer(text).input_ids
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_unknown_words_fall_into_pieces_and_leave_the_others_alone(
    tokenizer: CLIPTokenizer,
) -> None:
    pieces = tokenizer.tokenize("a Xylophon cat")
    assert pieces[0] == f"a{END_OF_WORD}"
    assert pieces[-1] == f"cat{END_OF_WORD}"
    assert len(pieces) > 3
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(pieces)


def test_prompts_are_padded_and_cut_to_the_models_length(tokenizer: CLIPTokenizer) -> None:
    for text in ("", "cat", "cat " * 40):
        tokens = tokenizer(
            text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True
        ).input_ids
        assert len(tokens) == MAX_TOKENS
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens[-1] == tokenizer.eos_token_id


def test_the_folder_holds_what_both_series_of_transformers_read(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"} <= names


def test_merges_are_the_same_for_the_same_words_in_any_order() -> None:
    assert learn_merges(word_counts(TEXTS)) == learn_merges(word_counts(TEXTS[::-1]))


def test_token_ids_are_consecutive_and_unique() -> None:
    vocabulary = build_vocabulary(learn_merges(word_counts(TEXTS)))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
