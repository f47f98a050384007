"""Decoded images to files: pixels as diffusers makes them, the arguments as text in the file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from services.vae_worker.png_file import write_png
from shared.errors import NumericalError
from shared.messages import ImageParameters


def to_pixels(image: torch.Tensor) -> Image.Image:
    """Return the picture of a decode, with the values of diffusers' `VaeImageProcessor`.

    Args:
        image: (1, 3, height, width), nominally in [-1, 1].

    Raises:
        NumericalError: A value is not finite.
    """
    if not bool(torch.isfinite(image).all()):
        raise NumericalError("the decoded picture is not finite")
    unit = (image[0].float() * 0.5 + 0.5).clamp(0, 1)
    pixels = (unit.permute(1, 2, 0).cpu().numpy() * 255).round().astype("uint8")
    return Image.fromarray(pixels)


def encode_image(
    image: torch.Tensor, *, parameters: ImageParameters, skipped_steps: Sequence[int] = ()
) -> bytes:
    """Return a file in `parameters.output_format`: "png", "jpeg" or "webp".

    `output_compression`, 0 to 100, is OpenAI's: how much of the picture to keep, so it is the
    quality of jpeg and webp; png loses nothing and ignores it. A png carries its arguments: as one
    `parameters` text that other tools read, and complete as JSON under `synerdiff`.

    Args:
        image: (1, 3, height, width), nominally in [-1, 1].
        parameters: What the picture was made from.
        skipped_steps: Steps whose guidance was extrapolated.

    Raises:
        NumericalError: A value is not finite.
    """
    picture = to_pixels(image)
    if parameters.output_format == "png":
        return write_png(np.asarray(picture), _text_chunks(parameters, skipped_steps))
    quality = parameters.output_compression
    target = io.BytesIO()
    if parameters.output_format == "jpeg":
        picture.save(target, format="jpeg", quality=max(1, quality), subsampling=0)
    else:
        picture.save(target, format=parameters.output_format, quality=quality)
    return target.getvalue()


def _text_chunks(parameters: ImageParameters, skipped_steps: Sequence[int]) -> PngInfo:
    chunks = PngInfo()
    negative = parameters.negative_prompt
    lines = [parameters.prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    settings = {
        "Steps": parameters.num_inference_steps,
        "Sampler": parameters.sampler,
        "CFG scale": parameters.guidance_scale,
        "Seed": parameters.seed,
        "Size": f"{parameters.width}x{parameters.height}",
        "Model": parameters.model,
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    chunks.add_itxt("parameters", "\n".join(lines))
    everything = {**asdict(parameters), "skipped_steps": list(skipped_steps)}
    chunks.add_itxt("synerdiff", json.dumps(everything, ensure_ascii=False))
    return chunks
