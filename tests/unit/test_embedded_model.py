"""The embedded model as it lies in `models/emoji`, and what is measured of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from bench.emoji import choose_questions
from training.captions import vocabulary_texts
from training.characters import share_understood, token_embeddings
from training.edges import (
    WINDOW,
    edge_sharpness_ratio,
    edge_steepness,
    load_edges,
    save_edges,
)
from training.emoji_set import character_forms, load_emoji_set
from training.retrieval import load_references, shrink
from training.tokenizer import train_tokenizer

MODEL = Path("models/emoji")
EMOJI_SET = load_emoji_set()
REFERENCES = load_references(MODEL)
ASKED = ("🍎", "❤", "❤️", "🐼", "🚀️", "🇫🇷", "a 🍕", "🦊 emoji")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_emoji_are_drawn_when_they_are_asked_for_by_their_characters(
    pipeline: StableDiffusionPipeline,
) -> None:
    pictures: list[Image.Image] = pipeline(
        list(ASKED),
        num_inference_steps=10,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(number) for number in range(len(ASKED))],
    ).images
    nearest = REFERENCES.nearest(torch.stack([shrink(picture) for picture in pictures]))
    forms = [character_forms(REFERENCES.characters[number]) for number in nearest]
    found = [
        any(form in caption for form in known) for caption, known in zip(ASKED, forms, strict=True)
    ]
    assert found == [True] * len(ASKED)


def test_every_character_means_its_name(pipeline: StableDiffusionPipeline) -> None:
    assert share_understood(pipeline.text_encoder, pipeline.tokenizer, EMOJI_SET) == 1


def test_the_tokenizer_is_that_of_the_captions(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    tokenizer: CLIPTokenizer = train_tokenizer(vocabulary_texts(EMOJI_SET), tmp_path)
    assert pipeline.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert len(token_embeddings(pipeline.text_encoder)) == len(tokenizer)


def test_references_are_those_of_the_set() -> None:
    assert REFERENCES.characters == tuple(emoji.characters for emoji in EMOJI_SET)
    assert REFERENCES.captions == tuple(emoji.captions for emoji in EMOJI_SET)
    edges = load_edges(MODEL, len(EMOJI_SET))
    assert edges.shape == (len(EMOJI_SET), 128 // WINDOW, 128 // WINDOW)
    # Both speak of the same pictures: what is all white has no edge, what has one is not.
    has_edge = edges.flatten(1).amax(dim=1) > 0
    is_blank = REFERENCES.pictures.flatten(1).amin(dim=1) == 1
    assert bool((has_edge & ~is_blank).all())
    darkest = -torch.nn.functional.max_pool2d(-REFERENCES.pictures.amin(dim=1), 2)
    assert edges[darkest == 1].mean() < 0.1 * edges[darkest < 1].mean()


def test_a_blur_is_less_sharp_and_a_shift_by_a_pixel_is_not() -> None:
    torch.manual_seed(0)
    blocks = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), scale_factor=16)
    blocks = blocks.roll((3, 3), dims=(2, 3))
    wanted = edge_steepness(blocks)
    assert edge_sharpness_ratio(wanted, wanted) == pytest.approx(1)
    blurred = torch.nn.functional.avg_pool2d(blocks, 5, stride=1, padding=2)
    assert edge_sharpness_ratio(edge_steepness(blurred), wanted) < 0.6
    shifted = blocks.roll((1, 1), dims=(2, 3))
    assert edge_sharpness_ratio(edge_steepness(shifted), wanted) > 0.95


def test_noise_where_the_font_has_no_edge_is_not_sharpness() -> None:
    torch.manual_seed(0)
    picture = torch.ones(1, 3, 64, 64)
    picture[..., 30:] = 0
    noisy = picture.clone()
    noisy[..., :16] -= 0.5 * torch.rand(1, 3, 64, 16)
    wanted = edge_steepness(picture)
    assert edge_sharpness_ratio(edge_steepness(noisy), wanted) == pytest.approx(1)


def test_edges_survive_the_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    steepness = 0.7 * torch.rand(30, 16, 16)
    save_edges(steepness, tmp_path)
    torch.testing.assert_close(load_edges(tmp_path, 30), steepness, rtol=0, atol=0.002)


def test_questions_are_distinct_and_cover_everything_where_all_is_asked() -> None:
    count = len(EMOJI_SET)
    questions = choose_questions(REFERENCES, count, 0, all_forms=True)
    assert {question.wanted for question in questions.names} == set(range(count))
    assert {question.caption for question in questions.characters} == {
        form for emoji in EMOJI_SET for form in character_forms(emoji.characters)
    }
    few = choose_questions(REFERENCES, 10, 0, all_forms=False)
    assert (len(few.names), len(few.synonyms), len(few.characters)) == (10, 5, 10)
    for question in (*few.names, *few.synonyms, *few.characters):
        emoji = EMOJI_SET[question.wanted]
        assert question.caption in (*emoji.captions, *character_forms(emoji.characters))
