from __future__ import annotations

import io
import json
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from services.vae_worker.image_encoder import encode_image, to_pixels
from services.vae_worker.png_file import write_png
from shared.errors import NumericalError
from shared.messages import ImageParameters

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.image_processor import VaeImageProcessor

PARAMETERS = ImageParameters(
    prompt="a red heart ♥, \u732b",
    negative_prompt="blurry",
    seed=2**63 - 1,
    height=24,
    width=40,
    num_inference_steps=25,
    guidance_scale=7.5,
    sampler="ddim",
    guidance_skip="balanced",
    output_format="png",
    output_compression=100,
    model="emoji",
)


@pytest.fixture
def image() -> torch.Tensor:
    """Smooth, with values beyond the range and many that lie between two pixel values."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, 6, 10, generator=generator) * 1.2
    return torch.nn.functional.interpolate(coarse, size=(24, 40), mode="bicubic")


def opened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def error(data: bytes, image: torch.Tensor) -> float:
    pixels, exact = np.asarray(opened(data), dtype=float), np.asarray(to_pixels(image), dtype=float)
    return float(np.square(pixels - exact).mean())


def test_a_png_has_the_pixels_of_diffusers_own_picture(image):
    expected = VaeImageProcessor().postprocess(image, output_type="pil")[0]
    picture = opened(encode_image(image, parameters=PARAMETERS))
    assert picture.mode == expected.mode == "RGB"
    assert picture.size == (40, 24)
    assert np.array_equal(np.asarray(picture), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 1), (16, 9)])
def test_a_png_of_any_size_holds_its_pixels_and_texts(size):
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    info = PngInfo()
    info.add_itxt("parameters", "a ♥")
    picture = opened(write_png(pixels, info))
    assert np.array_equal(np.asarray(picture), pixels)
    assert picture.text == {"parameters": "a ♥"}


def test_every_pixel_value_is_rounded_as_diffusers_rounds_it():
    image = torch.linspace(-1.01, 1.01, 3 * 64 * 64).reshape(1, 3, 64, 64)
    halves = (torch.arange(3 * 64 * 64) % 256 + 0.5).reshape(1, 3, 64, 64) / 255 * 2 - 1
    for values in (image, halves):
        expected = VaeImageProcessor().postprocess(values, output_type="pil")[0]
        assert np.array_equal(np.asarray(to_pixels(values)), np.asarray(expected))


def test_the_memory_format_of_the_decode_makes_no_difference(image):
    turned = image.to(memory_format=torch.channels_last)
    assert encode_image(turned, parameters=PARAMETERS) == encode_image(image, parameters=PARAMETERS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_decode_that_is_not_finite_is_an_error_and_no_picture(image, value):
    image[0, 1, 5, 7] = value
    with pytest.raises(NumericalError):
        encode_image(image, parameters=PARAMETERS)


@pytest.mark.parametrize(("output_format", "pillow"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_a_lower_output_compression_keeps_less_of_the_picture(image, output_format, pillow):
    files = [
        encode_image(
            image,
            parameters=replace(PARAMETERS, output_format=output_format, output_compression=level),
        )
        for level in (0, 50, 100)
    ]
    assert [opened(data).format for data in files] == [pillow] * 3
    assert [opened(data).size for data in files] == [(40, 24)] * 3
    assert len(files[0]) < len(files[1]) < len(files[2])
    assert error(files[0], image) > error(files[1], image) > error(files[2], image)


def test_png_ignores_the_compression_level_and_stays_exact(image):
    files = [
        encode_image(image, parameters=replace(PARAMETERS, output_compression=level))
        for level in (0, 100)
    ]
    assert [error(data, image) for data in files] == [0.0, 0.0]


def test_a_png_carries_its_arguments_as_json(image):
    picture = opened(encode_image(image, parameters=PARAMETERS, skipped_steps=[7, 9]))
    arguments = json.loads(picture.text["synerdiff"])
    assert arguments == {**asdict(PARAMETERS), "skipped_steps": [7, 9]}


def test_a_png_carries_its_arguments_as_other_tools_write_them(image):
    picture = opened(encode_image(image, parameters=PARAMETERS))
    prompt, negative, settings = picture.text["parameters"].splitlines()
    assert prompt == PARAMETERS.prompt
    assert negative == "Negative prompt: blurry"
    assert dict(pair.split(": ", 1) for pair in settings.split(", ")) == {
        "Steps": "25",
        "Sampler": "ddim",
        "CFG scale": "7.5",
        "Seed": str(2**63 - 1),
        "Size": "40x24",
        "Model": "emoji",
    }


def test_without_a_negative_prompt_no_line_speaks_of_one(image):
    plain = replace(PARAMETERS, negative_prompt="")
    picture = opened(encode_image(image, parameters=plain))
    assert "Negative prompt" not in picture.text["parameters"]


def test_arguments_survive_quotes_line_breaks_and_any_script(image):
    prompt = 'line one\n"quoted", \\slashed\\ \U0001f600 العربية'
    odd = replace(PARAMETERS, prompt=prompt)
    picture = opened(encode_image(image, parameters=odd))
    assert json.loads(picture.text["synerdiff"])["prompt"] == prompt
    assert picture.text["parameters"].startswith(prompt)
