"""A CLIPTokenizer of our own: byte-level BPE, merged until every known word is one token."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer

from training.emoji_set import VARIATION_SELECTOR

MAX_TOKENS = 16
START_TOKEN = "<|startoftext|>"  # noqa: S105 - a token of text
END_TOKEN = "<|endoftext|>"  # noqa: S105
END_OF_WORD = "</w>"

# CLIP's own pre-tokenization, in the syntax of the standard library.
_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+")

Pair = tuple[str, str]


def word_counts(texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    """Return how often each word is in `texts`, as the byte-level symbols that BPE starts from.

    A variation selector at the end is a word of its own, so that any emoji may have one.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for piece in _PIECES.findall(text.lower()):
            head = piece.removesuffix(VARIATION_SELECTOR)
            symbols = _symbols(piece if head == piece else VARIATION_SELECTOR)
            counts[(*symbols[:-1], symbols[-1] + END_OF_WORD)] += 1
            if head not in ("", piece):
                counts[_symbols(head)] += 1
    return counts


def _symbols(piece: str) -> tuple[str, ...]:
    """Return a symbol for each byte of `piece`."""
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    return tuple("".join(part for part, _ in byte_level.pre_tokenize_str(piece)))


def learn_merges(counts: Counter[tuple[str, ...]]) -> list[Pair]:
    """Return all merges of BPE (Sennrich et al. 2016): until each word is one symbol.

    Ties are broken by the alphabet, so that the same words give the same merges.
    """
    words = list(counts)
    weights = list(counts.values())
    pairs: Counter[Pair] = Counter()
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for number, symbols in enumerate(words):
        for pair in pairwise(symbols):
            pairs[pair] += weights[number]
            words_with[pair].add(number)
    merges: list[Pair] = []
    while pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for number in words_with.pop(best):
            for pair in pairwise(words[number]):
                pairs[pair] -= weights[number]
                if pairs[pair] == 0:
                    del pairs[pair]
            words[number] = _merged(words[number], best)
            for pair in pairwise(words[number]):
                pairs[pair] += weights[number]
                words_with[pair].add(number)
    return merges


def build_vocabulary(merges: list[Pair]) -> dict[str, int]:
    """Return every byte, alone and at a word's end, every merge, and the two special tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(symbol + END_OF_WORD for symbol in alphabet)]
    tokens += ["".join(pair) for pair in merges]
    tokens += [START_TOKEN, END_TOKEN]
    # Two merges may spell the same token: it keeps its first place.
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def train_tokenizer(texts: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Learn a tokenizer for `texts`, write it to `folder`, and return it as loaded from there."""
    merges = learn_merges(word_counts(texts))
    vocabulary = build_vocabulary(merges)
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=MAX_TOKENS,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    # transformers 5 reads tokenizer.json, its fourth series these two.
    (folder / "vocab.json").write_text(
        json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def _merged(symbols: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    """Return `symbols` with every occurrence of `pair` joined, left to right."""
    merged: list[str] = []
    is_joined = False  # a joined symbol may equal the first of the pair
    for symbol in symbols:
        if merged and not is_joined and (merged[-1], symbol) == pair:
            merged[-1] += symbol
            is_joined = True
        else:
            merged.append(symbol)
            is_joined = False
    return tuple(merged)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return the token ids (B, MAX_TOKENS) of `captions`, padded and cut."""
    tokens = tokenizer(
        captions,
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = tokens.input_ids
    return ids
