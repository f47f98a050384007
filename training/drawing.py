"""The UNet learns on what it meets when it draws, not on noised pictures alone.

A model that draws goes astray by errors of its own, which guidance multiplies, and comes to latents
that no noised picture is like. So pictures are drawn during the training, each step's prediction is
corrected towards the picture that was asked for, and the drawing goes on by what was predicted
(as in DAgger, Ross et al. 2011). One forward serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTokenizer

from training.captions import caption_variant
from training.diffusion import (
    NUM_TRAIN_TIMESTEPS,
    Denoiser,
    build_sampler,
    stratified_timesteps,
    velocity_weights,
)
from training.emoji_set import Emoji
from training.loop import Draws, LoopSettings, train
from training.tokenizer import MAX_TOKENS, tokenize

STEP_COUNTS = (8, 10, 20, 25, 25, 25, 25, 40)  # divisors of NUM_TRAIN_TIMESTEPS
GUIDANCE_SCALES = (1.0, 3.0, 5.0, 5.0, 5.0, 7.5)
GUIDED_WEIGHT = 0.3
ERROR_POWER = 2.0  # how much more often what is drawn badly is drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawingSettings:
    """How long and how hard it learns.

    A step takes, in each process, `rows` noised pictures and one step of `drawings` of the
    `underway` that are drawn at a time, guided, so of two rows each.
    """

    steps: int = 6_000
    rows: int = 4
    drawings: int = 14
    underway: int = 80
    peak_rate: float = 1e-4
    seed: int = 0


class DrawingCourse(nn.Module):
    """A denoiser and the drawings that it has underway; both are kept by a checkpoint.

    latents: (underway, C, h, w). picture, step_index, num_steps, guidance_scale: (underway,).
    token_ids: (underway, tokens). drawn: (pictures, C, h, w), the last drawing of each picture, the
    picture itself before the first. errors: (pictures,), of these.
    """

    latents: Tensor
    picture: Tensor
    step_index: Tensor
    num_steps: Tensor
    guidance_scale: Tensor
    token_ids: Tensor
    drawn: Tensor
    errors: Tensor

    def __init__(self, denoiser: Denoiser, *, underway: int, latents: Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.register_buffer("latents", torch.zeros(underway, *latents.shape[1:]))
        self.register_buffer("picture", torch.zeros(underway, dtype=torch.long))
        self.register_buffer("step_index", torch.zeros(underway, dtype=torch.long))
        self.register_buffer("num_steps", torch.zeros(underway, dtype=torch.long))
        self.register_buffer("guidance_scale", torch.zeros(underway))
        self.register_buffer("token_ids", torch.zeros(underway, MAX_TOKENS, dtype=torch.long))
        self.register_buffer("drawn", latents.clone())
        self.register_buffer("errors", torch.ones(len(latents)))

    def begin(self, place: int, emoji_set: tuple[Emoji, ...], tokens: Tokens, draws: Draws) -> None:
        """Begin a new drawing at `place`: more often of what was drawn badly last time."""
        weights = self.errors.pow(ERROR_POWER).tolist()
        (picture,) = draws.random.choices(range(len(emoji_set)), weights)
        caption = ""
        while not caption:
            caption = caption_variant(emoji_set[picture], draws.random)
        self.latents[place] = torch.randn(self.latents.shape[1:], generator=draws.generator)
        self.picture[place] = picture
        self.step_index[place] = 0
        self.num_steps[place] = draws.random.choice(STEP_COUNTS)
        self.guidance_scale[place] = draws.random.choice(GUIDANCE_SCALES)
        self.token_ids[place] = tokens([caption])[0]

    def timesteps(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """Return the timesteps of drawings, and those behind them; negative behind the last."""
        stride = NUM_TRAIN_TIMESTEPS // self.num_steps[places]
        now = NUM_TRAIN_TIMESTEPS - stride * self.step_index[places] - 1
        return now, now - stride


Tokens = Callable[[list[str]], Tensor]


def true_velocity(noisy: Tensor, clean: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return the velocity that leads from `noisy` (B, C, h, w) to `clean`, whatever made `noisy`.

    `alphas_cumprod` (B,) are those of its timesteps.
    """
    alpha, sigma = _alpha_sigma(alphas_cumprod)
    return (alpha * noisy - clean) / sigma


def ddim_step(noisy: Tensor, velocity: Tensor, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents one DDIM step on (Song et al. 2020), and the picture that it sees.

    `now` and `then` (B,) are the cumulative products of alphas.
    """
    alpha, sigma = _alpha_sigma(now)
    clean, noise = alpha * noisy - sigma * velocity, alpha * velocity + sigma * noisy
    alpha, sigma = _alpha_sigma(then)
    return alpha * clean + sigma * noise, clean


def train_drawing(
    denoiser: Denoiser,
    tokenizer: CLIPTokenizer,
    *,
    emoji_set: tuple[Emoji, ...],
    latents: Tensor,
    settings: DrawingSettings,
    checkpoint: Path,
    on_save: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Teach a `denoiser` that can draw `latents` (N, C, h, w) to draw them well.

    Returns the average of the `DrawingCourse`.
    """
    sampler = build_sampler()
    alphas_cumprod = sampler.alphas_cumprod
    weights = velocity_weights(alphas_cumprod)
    # At these small maps a training step takes a fifth less time so.
    denoiser.unet.to(memory_format=torch.contiguous_format)
    denoiser.unet.set_attn_processor(AttnProcessor())
    course = DrawingCourse(denoiser, underway=settings.underway, latents=latents)
    empty = tokenize(tokenizer, [""])

    def tokens(captions: list[str]) -> Tensor:
        return tokenize(tokenizer, captions)

    def loss_of(draws: Draws) -> Tensor:
        indices = draws.indices(len(latents), rows=settings.rows)
        captions = [caption_variant(emoji_set[index], draws.random) for index in indices]
        steps = stratified_timesteps(draws, settings.rows)
        noise = torch.randn(latents[indices].shape, generator=draws.generator)
        noised = sampler.add_noise(latents[indices], noise, steps)

        places = draws.random.sample(range(settings.underway), settings.drawings)
        for place in places:
            if course.step_index[place] >= course.num_steps[place]:
                course.begin(place, emoji_set, tokens, draws)
        begun, scales = course.latents[places], course.guidance_scale[places].view(-1, 1, 1, 1)
        now, then = course.timesteps(places)

        noisy = torch.cat([noised, begun, begun])
        timesteps = torch.cat([steps, now, now])
        clean = latents[indices + 2 * course.picture[places].tolist()]
        token_ids = torch.cat(
            [tokens(captions), course.token_ids[places], empty.expand(len(places), -1)]
        )
        with torch.autocast("cpu", torch.bfloat16):
            predicted = denoiser(noisy, timesteps, token_ids).float()
        wanted = true_velocity(noisy, clean, alphas_cumprod[timesteps])
        error = (predicted - wanted).square().mean(dim=(1, 2, 3))
        loss: Tensor = (error * weights[timesteps]).mean()

        _, positive, negative = predicted.split([len(steps), len(places), len(places)])
        guided = negative + scales * (positive - negative)
        guided_error = (guided - wanted[-len(places) :]).square().mean(dim=(1, 2, 3))
        # Only where the latents show which picture it is, can both sides be right at once.
        shown = weights[now] * alphas_cumprod[now]
        loss = loss + GUIDED_WEIGHT * (guided_error * shown).mean()

        with torch.no_grad():
            ahead, seen = ddim_step(
                begun, guided, alphas_cumprod[now], alphas_cumprod[then.clamp(min=0)]
            )
            course.latents[places] = ahead
            course.step_index[places] += 1
            off = (seen - clean[-len(places) :]).square().mean(dim=(1, 2, 3)).sqrt()
            for row, place in enumerate(places):
                if course.step_index[place] == course.num_steps[place]:
                    course.drawn[course.picture[place]] = ahead[row]
                    course.errors[course.picture[place]] = off[row]
        return loss

    return train(
        course,
        loss_of,
        LoopSettings(
            steps=settings.steps,
            peak_rate=settings.peak_rate,
            weight_decay=0.01,
            average_decay=0.995,
            seed=settings.seed,
        ),
        checkpoint,
        on_save=on_save,
    )


def _alpha_sigma(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales of picture and noise, (B, 1, 1, 1)."""
    column = alphas_cumprod.view(-1, 1, 1, 1)
    return column.sqrt(), (1 - column).sqrt()
