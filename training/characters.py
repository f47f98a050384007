"""The text encoder learns the emoji themselves: a character is to mean what its name means.

Only the embeddings of the characters' own tokens learn, so what the encoder makes of words stays as
it is, and a UNet that knows the words knows the characters, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.captions import caption_style
from training.emoji_set import VARIATION_SELECTOR, Emoji, character_forms
from training.loop import Draws, LoopSettings, train
from training.tokenizer import tokenize

P_STYLED = 0.3
ROWS_TOGETHER = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CharacterSettings:
    """How long and how hard they learn; a step is `rows` emoji in each process."""

    steps: int = 400
    rows: int = 128
    peak_rate: float = 0.02
    seed: int = 0


def train_characters(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    *,
    emoji_set: tuple[Emoji, ...],
    settings: CharacterSettings,
    checkpoint: Path,
) -> CLIPTextModel:
    """Teach `text_encoder` that each emoji's characters mean its name; return it, having learned.

    A caption with characters is to end in the hidden state that it ends in with the name: that one
    has seen all of the caption, and fills most of the 16 places.
    """
    text_encoder.requires_grad_(requires_grad=False)
    embeddings = token_embeddings(text_encoder)
    is_character = torch.zeros(len(embeddings), 1)
    is_character[character_tokens(tokenizer, emoji_set)] = 1
    embeddings.requires_grad_()
    embeddings.register_hook(lambda gradient: gradient * is_character)  # type: ignore[no-untyped-call]
    names = tokenize(tokenizer, [emoji.name for emoji in emoji_set])
    with torch.no_grad():
        spread = end_states(text_encoder, names).var(dim=0).mean()

    def loss_of(draws: Draws) -> Tensor:
        chosen = [emoji_set[i] for i in draws.indices(len(emoji_set), rows=settings.rows)]
        forms = [draws.random.choice(character_forms(emoji.characters)) for emoji in chosen]
        is_styled = draws.random.random() < P_STYLED
        styles = [caption_style(draws.random) if is_styled else "{}" for _ in chosen]
        drawn = [style.format(form) for style, form in zip(styles, forms, strict=True)]
        named = [style.format(emoji.name) for style, emoji in zip(styles, chosen, strict=True)]
        with torch.no_grad():
            wanted = end_states(text_encoder, tokenize(tokenizer, named))
        error = end_states(text_encoder, tokenize(tokenizer, drawn)) - wanted
        loss: Tensor = error.square().mean() / spread
        return loss

    train(
        text_encoder,
        loss_of,
        LoopSettings(
            steps=settings.steps,
            peak_rate=settings.peak_rate,
            weight_decay=0.0,
            average_decay=0.9,
            seed=settings.seed,
            warmup_steps=20,
        ),
        checkpoint,
    )
    return text_encoder


def token_embeddings(text_encoder: CLIPTextModel) -> Tensor:
    """Return the embedding (tokens, width) of every token."""
    weights: Tensor = text_encoder.get_input_embeddings().weight
    return weights


def character_tokens(tokenizer: CLIPTokenizer, emoji_set: tuple[Emoji, ...]) -> list[int]:
    """Return the tokens that stand for characters, less the variation selector, in order."""
    selector = set(_tokens(tokenizer, VARIATION_SELECTOR))
    forms = [form for emoji in emoji_set for form in character_forms(emoji.characters)]
    return sorted({token for form in forms for token in _tokens(tokenizer, form)} - selector)


@torch.no_grad()
def start_with_names(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, emoji_set: tuple[Emoji, ...]
) -> None:
    """Let characters start as the sum of their names' words, and variation selectors as nothing."""
    embeddings = token_embeddings(text_encoder)
    for emoji in emoji_set:
        words = embeddings[_tokens(tokenizer, emoji.name)].sum(dim=0)
        for form in character_forms(emoji.characters):
            embeddings[_tokens(tokenizer, form)[0]] = words
    embeddings[_tokens(tokenizer, VARIATION_SELECTOR)] = 0


@torch.no_grad()
def with_characters(
    text_encoder: CLIPTextModel,
    known: CLIPTokenizer,
    wanted: CLIPTokenizer,
    emoji_set: tuple[Emoji, ...],
) -> CLIPTextModel:
    """Return `text_encoder`, which knows `known`'s tokens, with `wanted`'s; equal ones stay."""
    ids, wanted_ids = known.get_vocab(), wanted.get_vocab()
    if ids == wanted_ids:
        return text_encoder
    old = token_embeddings(text_encoder).clone()
    text_encoder.resize_token_embeddings(len(wanted), mean_resizing=False)
    embeddings = token_embeddings(text_encoder)
    for token, number in wanted_ids.items():
        if token in ids:
            embeddings[number] = old[ids[token]]
    config = text_encoder.config
    config.bos_token_id, config.eos_token_id = wanted.bos_token_id, wanted.eos_token_id
    config.pad_token_id = wanted.pad_token_id
    start_with_names(text_encoder, wanted, emoji_set)
    return text_encoder


def end_states(text_encoder: CLIPTextModel, token_ids: Tensor) -> Tensor:
    """Return the hidden state (B, width) behind the end of each caption (B, tokens).

    Short captions are encoded together and cut to their length: attention is causal.
    """
    end = token_ids[:, -1:]  # captions that fill all places end there, too
    lengths = ((token_ids != end).sum(dim=1) + 1).clamp(max=token_ids.shape[1])
    order = lengths.argsort()
    states = [
        text_encoder(token_ids[rows, : int(lengths[rows].max())])[0][:, -1]
        for rows in torch.split(order, ROWS_TOGETHER)
    ]
    return torch.cat(states)[order.argsort()]


@torch.no_grad()
def share_understood(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, emoji_set: tuple[Emoji, ...]
) -> float:
    """Return the share of characters whose end state is nearest to that of their own name."""
    asked = [
        (number, form)
        for number, emoji in enumerate(emoji_set)
        for form in character_forms(emoji.characters)
    ]
    names = end_states(text_encoder, tokenize(tokenizer, [emoji.name for emoji in emoji_set]))
    drawn = end_states(text_encoder, tokenize(tokenizer, [form for _, form in asked]))
    nearest = torch.cdist(drawn, names).argmin(dim=1).tolist()
    return fmean(found == number for found, (number, _) in zip(nearest, asked, strict=True))


def _tokens(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return tokens
