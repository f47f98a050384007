"""Prompt embeddings against `StableDiffusionPipeline.encode_prompt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import load_reference_pipeline

from services.unet_worker.model import load_model
from services.unet_worker.text_encoder import TextEncoder

PROMPTS = ["a red cat", "", "the blue dog of the moon", "heart, " * 9, "a red cat"]


@pytest.fixture(scope="module")
def pipeline(tiny_model_folder: Path) -> Any:
    return load_model(tiny_model_folder, device="cpu", dtype="float32").pipeline


def _encoder(pipeline: Any, max_cached: int = 256) -> TextEncoder:
    return TextEncoder(pipeline, device=torch.device("cpu"), max_cached=max_cached)


def test_embeddings_are_the_pipelines_also_of_the_empty_negative_prompt(
    pipeline: Any, tiny_model_folder: Path
) -> None:
    reference = load_reference_pipeline(tiny_model_folder)
    embeds, negative = reference.encode_prompt("a red cat", "cpu", 1, True, None)
    positive, empty = _encoder(pipeline).encode(["a red cat", ""])
    torch.testing.assert_close(positive.embeds, embeds[0])
    torch.testing.assert_close(empty.embeds, negative[0])


def test_prompts_encoded_together_come_out_as_alone(pipeline: Any) -> None:
    together = _encoder(pipeline).encode(PROMPTS)
    for prompt, embedding in zip(PROMPTS, together, strict=True):
        alone = _encoder(pipeline).encode([prompt])[0]
        torch.testing.assert_close(embedding.embeds, alone.embeds)
        assert embedding.num_dropped_tokens == alone.num_dropped_tokens
    assert not torch.allclose(together[0].embeds, together[2].embeds)


def test_tokens_beyond_the_models_length_are_counted(pipeline: Any) -> None:
    whole, cut = _encoder(pipeline).encode(["a " * 14, "a " * 17])
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
    encoder.encode(["sun", "moon", "sun"])
    encoder.encode(["sun"])
    encoder.encode(["tree"])
    encoder.encode(["sun"])
    encoder.encode(["moon"])
    assert encoded == [["sun", "moon"], ["tree"], ["moon"]]
