"""Prompts to embeddings, several at once, with a cache in front."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptEmbedding:
    """One encoded prompt.

    embeds: shape (max_tokens, text_width), in the model's dtype and on its device; not to be
    changed. num_dropped_tokens: tokens beyond the model's length, which it does not see.
    """

    embeds: torch.Tensor
    num_dropped_tokens: int


class TextEncoder:
    """Encodes as `StableDiffusionPipeline.encode_prompt` does, by calling it.

    A prompt's embedding does not depend on what is encoded beside it (up to the last bits, since
    matrix kernels differ by batch size).

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

    def encode(self, prompts: Sequence[str]) -> list[PromptEmbedding]:
        """The embeddings of `prompts`, in order; those not in the cache in one forward."""
        found = {text: self._cache[text] for text in prompts if text in self._cache}
        missing = [text for text in dict.fromkeys(prompts) if text not in found]
        if missing:
            found |= zip(missing, self._encode_batch(missing), strict=True)
        for text, embedding in found.items():
            self._cache[text] = embedding
            self._cache.move_to_end(text)
        while len(self._cache) > self._max_cached:
            self._cache.popitem(last=False)
        return [found[text] for text in prompts]

    @torch.inference_mode()
    def _encode_batch(self, prompts: list[str]) -> list[PromptEmbedding]:
        embeds, _ = self._pipeline.encode_prompt(
            prompts, self._device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        max_tokens = embeds.shape[1]
        tokens = self._pipeline.tokenizer(prompts).input_ids
        return [
            PromptEmbedding(
                embeds=row.clone(), num_dropped_tokens=max(len(prompt_tokens) - max_tokens, 0)
            )
            for row, prompt_tokens in zip(embeds, tokens, strict=True)
        ]
