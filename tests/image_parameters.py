"""A complete order for a picture; tests change what they are about."""

from __future__ import annotations

from shared.messages import ImageParameters

PARAMETERS = ImageParameters(
    prompt="a red cat",
    negative_prompt="",
    seed=1,
    height=64,
    width=64,
    num_inference_steps=6,
    guidance_scale=5.0,
    sampler="ddim",
    guidance_skip="off",
    output_format="png",
    output_compression=0,
    model="tiny",
)
