"""Writes the trained parts as one diffusers folder, fp16, with references and a model card.

Beside them lies `words.json`: what the model has learned, by which a service can name the rest.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from training.captions import known_words
from training.diffusion import Denoiser, build_sampler
from training.edges import edge_steepness, save_edges
from training.emoji_set import Emoji
from training.retrieval import REFERENCE_SIZE, References

WORDS_FILE = "words.json"
MODEL_CARD = Path(__file__).with_name("model_card.md")


def build_pipeline(
    vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Return the parts as diffusers' own pipeline, without a safety checker."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=build_sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export_model(
    pipeline: StableDiffusionPipeline,
    emoji_set: tuple[Emoji, ...],
    pixels: Tensor,
    folder: Path,
) -> None:
    """Write `pipeline` (left in fp16) and its references to `folder`.

    `pixels` are the training pictures (N, 3, 128, 128) uint8.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_files = Path(pipeline.tokenizer.name_or_path)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(tokenizer_files / name, folder / "tokenizer" / name)
    _finish_configs(folder)
    blocks = pixels.shape[-1] // REFERENCE_SIZE
    save_words(emoji_set, folder)
    save_edges(edge_steepness(pixels.float() / 255), folder)
    References(
        characters=tuple(emoji.characters for emoji in emoji_set),
        captions=tuple(emoji.captions for emoji in emoji_set),
        pictures=torch.nn.functional.avg_pool2d(pixels.float() / 255, blocks),
    ).save(folder)
    shutil.copyfile(MODEL_CARD, folder / "README.md")


def save_words(emoji_set: tuple[Emoji, ...], folder: Path) -> None:
    """Write the words and the emoji that captions are made of."""
    lists = {
        "words": known_words(emoji_set),
        "characters": [emoji.characters for emoji in emoji_set],
    }
    text = json.dumps(lists, ensure_ascii=False, indent=0)
    (folder / WORDS_FILE).write_text(text + "\n", encoding="utf-8")


def _finish_configs(folder: Path) -> None:
    """Remove what the libraries note about this machine, and say that fp32 is the default.

    transformers would else give the text encoder the weights' fp16, diffusers the rest fp32.
    """
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            continue
        noted = dict(config)
        config.pop("_name_or_path", None)
        if "dtype" in config:
            config["dtype"] = "float32"
        if config != noted:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
