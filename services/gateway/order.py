"""From a checked body to the pictures it asks for: defaults filled in, limits of the model kept.

Pure: the random seed is passed in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.gateway.validation import (
    MAX_SEED,
    GenerationBody,
    unknown_fields,
)
from shared.errors import InvalidRequestError
from shared.guidance_skip import SKIP_LEVELS
from shared.messages import ImageParameters, ModelInfo
from shared.settings import GatewaySettings

_LEVELS = tuple(SKIP_LEVELS)
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_WITHOUT_EFFECT = ("quality", "style", "complexity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may be asked of one model here, and what holds where nothing is asked."""

    model: ModelInfo
    max_side: int
    """In pixels, as are the default sides."""
    default_height: int
    default_width: int
    max_steps: dict[str, int]
    """The most steps by sampler."""
    default_sampler: str
    default_guidance_scale: float
    default_guidance_skip: str
    max_guidance_skip: str
    wanted_steps: int

    def default_steps(self, sampler: str) -> int:
        """Return the steps where none are asked for."""
        return min(self.wanted_steps, self.max_steps[sampler])

    @property
    def allowed_sizes(self) -> str:
        """Return what `size` may be, in words."""
        multiple = self.model.side_multiple
        return (
            f'"auto" or "WIDTHxHEIGHT" with sides from {multiple} to {self.max_side} in multiples '
            f'of {multiple}, such as "{self.default_width}x{self.default_height}"'
        )


def limits_of(model: ModelInfo, settings: GatewaySettings) -> Limits:
    """Return a model's limits, narrowed by the settings."""
    multiple = model.side_multiple
    max_side = max(multiple, min(model.max_side, settings.max_side) // multiple * multiple)
    wanted = settings.default_sampler
    return Limits(
        model=model,
        max_side=max_side,
        default_height=min(model.default_height, max_side),
        default_width=min(model.default_width, max_side),
        max_steps={
            sampler: min(settings.max_steps, model.max_steps_by_sampler.get(sampler, 1_000))
            for sampler in model.samplers
        },
        default_sampler=wanted if wanted in model.samplers else model.default_sampler,
        default_guidance_scale=settings.default_guidance_scale,
        default_guidance_skip=min(
            settings.default_guidance_skip, settings.max_guidance_skip, key=_LEVELS.index
        ),
        max_guidance_skip=settings.max_guidance_skip,
        wanted_steps=settings.default_steps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOrder:
    """The pictures of one HTTP request, in order, and how they are to be handed over."""

    model: ModelInfo
    images: tuple[ImageParameters, ...]
    response_format: str
    is_streamed: bool
    priority: int
    deadline_ms: int
    quality: str
    warnings: tuple[str, ...]


def order_images(body: GenerationBody, limits: Limits, *, random_seed: int) -> ImageOrder:
    """Return what a body asks of a model.

    Raises:
        InvalidRequestError: Names the field, and what this model allows.
    """
    n = body.n or 1
    if body.stream and n > 1:
        raise InvalidRequestError(
            f"'n' is {n} and 'stream' is true, and events do not say which picture they are of.",
            field="n",
            allowed="1 with 'stream'",
        )
    width, height = _parse_size(body.size, limits)
    sampler = _choose_sampler(body.sampler, limits)
    output_format = body.output_format or "png"
    first_seed = random_seed if body.seed is None else body.seed
    if first_seed > MAX_SEED - (n - 1):
        raise InvalidRequestError(
            f"'seed' is {first_seed}, too large for {n} consecutive seeds.",
            field="seed",
            allowed=f"0 to {MAX_SEED - (n - 1)} with 'n' of {n}",
        )
    guidance_scale = body.guidance_scale
    images = tuple(
        ImageParameters(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt or "",
            seed=first_seed + index,
            height=height,
            width=width,
            num_inference_steps=_choose_steps(body.num_inference_steps, sampler, limits),
            guidance_scale=limits.default_guidance_scale
            if guidance_scale is None
            else float(guidance_scale),
            sampler=sampler,
            guidance_skip=_choose_skip(body, limits),
            output_format=output_format,
            output_compression=100 if body.output_compression is None else body.output_compression,
            model=limits.model.model_id,
        )
        for index in range(n)
    )
    return ImageOrder(
        model=limits.model,
        images=images,
        response_format=body.response_format or "b64_json",
        is_streamed=bool(body.stream),
        priority=body.priority or 0,
        deadline_ms=body.deadline_ms or 0,
        quality=body.quality
        if body.quality in {"low", "medium", "high", "xhigh", "max"}
        else "high",
        warnings=_warn(body, limits, output_format),
    )


def _parse_size(size: str | None, limits: Limits) -> tuple[int, int]:
    if size is None or size == "auto":
        return limits.default_width, limits.default_height
    match = _SIZE.fullmatch(size)
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    multiple = limits.model.side_multiple
    if any(not multiple <= side <= limits.max_side or side % multiple for side in sides):
        raise InvalidRequestError(
            f"'size' is {size!r}.", field="size", allowed=limits.allowed_sizes
        )
    return sides


def _choose_sampler(sampler: str | None, limits: Limits) -> str:
    if sampler is None:
        return limits.default_sampler
    if sampler not in limits.max_steps:
        raise InvalidRequestError(
            f"'sampler' is {sampler!r}.", field="sampler", allowed=", ".join(limits.max_steps)
        )
    return sampler


def _choose_steps(steps: int | None, sampler: str, limits: Limits) -> int:
    if steps is None:
        return limits.default_steps(sampler)
    if steps > limits.max_steps[sampler]:
        raise InvalidRequestError(
            f"'num_inference_steps' is {steps if steps < 10**9 else 'enormous'}.",
            field="num_inference_steps",
            allowed=f"1 to {limits.max_steps[sampler]} with sampler {sampler}",
        )
    return steps


def _choose_skip(body: GenerationBody, limits: Limits) -> str:
    """Return the level, no higher than the service's cap.

    An explicit seed without `guidance_skip` means "off": whoever names a seed expects that picture.
    """
    default = "off" if body.seed is not None else limits.default_guidance_skip
    asked = body.guidance_skip or default
    return min(asked, limits.max_guidance_skip, key=_LEVELS.index)


def _warn(body: GenerationBody, limits: Limits, output_format: str) -> tuple[str, ...]:
    warnings = [f"'{name}' is not known here and was ignored." for name in unknown_fields(body)]
    warnings += [
        f"'{name}' has no effect here."
        for name in _WITHOUT_EFFECT
        if getattr(body, name) not in {None, "auto"}
    ]
    if body.guidance_skip and body.guidance_skip != _choose_skip(body, limits):
        warnings.append(f"'guidance_skip' is at most {limits.max_guidance_skip!r} here.")
    if body.output_compression is not None and output_format == "png":
        warnings.append("'output_compression' has no effect on png.")
    if body.partial_images and body.stream:
        warnings.append("'partial_images' are not sent; progress comes as comment lines.")
    return tuple(warnings)


def count_prompt_tokens(order: ImageOrder) -> int:
    """Return about how many tokens of the prompt are read: words and marks, up to the limit."""
    words = re.findall(r"\w+|[^\w\s]", order.images[0].prompt)
    return min(len(words), order.model.max_prompt_tokens)


def count_latent_positions(order: ImageOrder) -> int:
    """Return how many latent positions all the pictures have together."""
    factor = order.model.vae_scale_factor
    return sum((image.width // factor) * (image.height // factor) for image in order.images)
