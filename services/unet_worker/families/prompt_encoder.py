"""Prompts to embeddings, with a cache in front."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptEmbedding:
    """An encoded prompt."""

    embeds: torch.Tensor
    """(max_tokens, width), in the model's dtype and on its device; not to be changed."""

    num_dropped_tokens: int
    """Tokens beyond the model's length, which it does not see."""


class PromptEncoder:
    """Encodes as `StableDiffusionPipeline.encode_prompt` does, by calling it.

    Each prompt is encoded alone: matrix kernels differ by the number of rows, and a picture must
    not depend on which of its prompts were in the cache.

    Args:
        pipeline: With tokenizer and text encoder.
        device: Where the text encoder is.
        max_cached: Embeddings kept, the least recently used goes first.
    """

    def __init__(self, pipeline: Any, *, device: torch.device, max_cached: int = 256) -> None:
        self._pipeline = pipeline
        self._device = device
        self._max_cached = max_cached
        self._cache: OrderedDict[str, PromptEmbedding] = OrderedDict()

    def encode(self, prompt: str) -> PromptEmbedding:
        """Return the prompt's embedding, from the cache if it is there."""
        embedding = self._cache.pop(prompt, None) or self._encode(prompt)
        self._cache[prompt] = embedding
        while len(self._cache) > self._max_cached:
            self._cache.popitem(last=False)
        return embedding

    @torch.inference_mode()
    def _encode(self, prompt: str) -> PromptEmbedding:
        embeds, _ = self._pipeline.encode_prompt(
            [prompt], self._device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        num_tokens = len(self._pipeline.tokenizer(prompt).input_ids)
        return PromptEmbedding(
            embeds=embeds[0].clone(), num_dropped_tokens=max(num_tokens - embeds.shape[1], 0)
        )
