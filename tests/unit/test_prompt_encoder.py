"""Prompt embeddings against `StableDiffusionPipeline.encode_prompt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import load_reference_pipeline

from services.unet_worker.families.loading import load_family
from services.unet_worker.families.prompt_encoder import PromptEncoder

PROMPTS = ["a red cat", "", "the blue dog of the moon", "heart, " * 9, "a red cat"]


@pytest.fixture(scope="module")
def pipeline(tiny_model_folder: Path) -> Any:
    return load_family(tiny_model_folder, device="cpu", dtype="float32").pipeline


def _encoder(pipeline: Any, max_cached: int = 256) -> PromptEncoder:
    return PromptEncoder(pipeline, device=torch.device("cpu"), max_cached=max_cached)


def test_embeddings_are_the_pipelines_also_of_the_empty_negative_prompt(
    pipeline: Any, tiny_model_folder: Path
) -> None:
    reference = load_reference_pipeline(tiny_model_folder)
    embeds, negative = reference.encode_prompt("a red cat", "cpu", 1, True, None)
    encoder = _encoder(pipeline)
    positive, empty = encoder.encode("a red cat"), encoder.encode("")
    torch.testing.assert_close(positive.embeds, embeds[0])
    torch.testing.assert_close(empty.embeds, negative[0])


def test_an_embedding_is_the_same_whatever_was_encoded_before(pipeline: Any) -> None:
    encoder = _encoder(pipeline)
    embeddings = [encoder.encode(prompt) for prompt in PROMPTS]
    for prompt, embedding in zip(PROMPTS, embeddings, strict=True):
        alone = _encoder(pipeline).encode(prompt)
        assert torch.equal(embedding.embeds, alone.embeds)
        assert embedding.num_dropped_tokens == alone.num_dropped_tokens
    assert not torch.allclose(embeddings[0].embeds, embeddings[2].embeds)


def test_tokens_beyond_the_models_length_are_counted(pipeline: Any) -> None:
    encoder = _encoder(pipeline)
    whole, cut = encoder.encode("a " * 14), encoder.encode("a " * 17)
    assert whole.num_dropped_tokens == 0
    assert cut.num_dropped_tokens == 3
    torch.testing.assert_close(whole.embeds, cut.embeds)


def test_a_prompt_is_encoded_once_while_it_is_in_use(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[list[str]] = []
    encode_prompt = pipeline.encode_prompt

    def spy(prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        encoded.append(prompts)
        return encode_prompt(prompts, *args, **kwargs)

    monkeypatch.setattr(pipeline, "encode_prompt", spy)
    encoder = _encoder(pipeline, max_cached=2)
    for prompt in ("sun", "moon", "sun", "tree", "sun", "moon"):
        encoder.encode(prompt)
    assert encoded == [["sun"], ["moon"], ["tree"], ["moon"]]
