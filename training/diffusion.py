"""The UNet and the text encoder: what they are, and how they learn to draw the latents."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.captions import caption_variant
from training.characters import start_with_names
from training.emoji_set import Emoji
from training.initialisation import (
    start_near_identity,
    start_with_distinct_captions,
    start_with_distinct_words,
)
from training.loop import Draws, LoopSettings, train
from training.tokenizer import MAX_TOKENS, tokenize
from training.vae import LATENT_CHANNELS, LATENT_SIZE

TEXT_WIDTH = 384
TEXT_LAYERS = 2
EMBEDDING_WIDTH = 640  # of time and pooled text: about as many dimensions as there are pictures
CAPTIONS_TOLD_APART = 12  # of each picture
NUM_TRAIN_TIMESTEPS = 1000
MIN_SNR_GAMMA = 5.0
NOISY_BIAS = 0.7  # below 1: a larger share of the timesteps is noisy


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionSettings:
    """How long and how hard the UNet learns; a step is `rows` captioned latents in each process."""

    steps: int = 10_000
    rows: int = 16
    peak_rate: float = 1e-3
    seed: int = 0


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a fresh two-layer CLIP text model over `tokenizer`'s words."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=6,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    start_with_distinct_words(text_encoder, [tokenizer.bos_token_id, tokenizer.eos_token_id])
    return text_encoder


def build_unet() -> UNet2DConditionModel:
    """Return a fresh UNet: few FLOPs at 16x16 and 8x8, most parameters and all attention below.

    Text enters twice: by cross attention at 4x4 and 2x2, and, pooled, by scale and shift of every
    residual block (`addition_embed_type="text"`), by which recall is learned much faster.
    """
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 64, 128, 192),
        layers_per_block=1,
        down_block_types=(
            "DownBlock2D",
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
        ),
        up_block_types=(
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "UpBlock2D",
            "UpBlock2D",
        ),
        attention_head_dim=(1, 2, 4, 6),  # in this class the numbers of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
        time_embedding_dim=EMBEDDING_WIDTH,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=6,
    )
    start_near_identity(unet, branch_gain=0.25)
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def build_sampler() -> DDIMScheduler:
    """Return the noise schedule and the folder's default sampler.

    The betas end a little higher than is usual: 16x16 latents need more noise before nothing of
    the picture is left (sqrt(alpha_bar) of the last step is 0.02), and that keeps whites white.
    It stays above zero, since most samplers divide by it.
    """
    return DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.0005,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def velocity_weights(alphas_cumprod: Tensor) -> Tensor:
    """Loss weight per timestep (T,): 1 where noise rules, min(1, gamma / (SNR + 1)) elsewhere.

    On velocity an unweighted loss already weighs x0 by SNR + 1; this caps it at gamma, as Min-SNR
    does (Hang et al. 2023), but leaves the noisy end, where text alone decides, at its full weight.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (MIN_SNR_GAMMA / (snr + 1)).clamp(max=1.0)


class Denoiser(nn.Module):
    """Text encoder and UNet; the text side stays as it starts.

    It starts with captions told apart (`initialisation`). Learning undoes that: Adam's first steps,
    all in the few directions that tell colours apart, leave the embeddings an effective rank of 3,
    and recall has to wait until the rest is learned back.
    """

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder.requires_grad_(requires_grad=False)
        self.unet = unet.to(memory_format=torch.channels_last)
        self.unet.add_embedding.requires_grad_(requires_grad=False)

    def forward(self, noisy: Tensor, timesteps: Tensor, token_ids: Tensor) -> Tensor:
        """Predict the velocity (B, C, h, w) of `noisy`, given its timesteps (B,) and tokens."""
        prompt_embeds = self.text_encoder(token_ids)[0]
        velocity: Tensor = self.unet(noisy, timesteps, prompt_embeds, return_dict=False)[0]
        return velocity


def build_denoiser(tokenizer: CLIPTokenizer, emoji_set: tuple[Emoji, ...]) -> Denoiser:
    """Return both, fresh, with the captions of `emoji_set` told apart."""
    denoiser = Denoiser(build_text_encoder(tokenizer), build_unet())
    start_with_names(denoiser.text_encoder, tokenizer, emoji_set)
    rng = random.Random(0)
    labels = [number for number in range(len(emoji_set)) for _ in range(CAPTIONS_TOLD_APART)]
    # Characters will mean what names mean, but don't yet.
    captions = [caption_variant(emoji_set[label], rng, p_characters=0.0) for label in labels]
    start_with_distinct_captions(
        denoiser.text_encoder,
        denoiser.unet.add_embedding,
        token_ids=tokenize(tokenizer, captions),
        labels=torch.tensor(labels),
    )
    return denoiser


def stratified_timesteps(draws: Draws, rows: int) -> Tensor:
    """Return one timestep (B,) from each of B strata, in random order; more of the noisy ones.

    There the text alone decides what is drawn, which takes the longest to learn.
    """
    strata = draws.random.sample(range(rows), rows)
    places = [(stratum + draws.random.random()) / rows for stratum in strata]
    return torch.tensor([int(place**NOISY_BIAS * NUM_TRAIN_TIMESTEPS) for place in places])


def train_diffusion(
    denoiser: Denoiser,
    tokenizer: CLIPTokenizer,
    *,
    emoji_set: tuple[Emoji, ...],
    latents: Tensor,
    settings: DiffusionSettings,
    checkpoint: Path,
    on_save: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Teach `denoiser` to draw `latents` (N, C, h, w) from their captions; return its average."""
    sampler = build_sampler()
    weights = velocity_weights(sampler.alphas_cumprod)

    def loss_of(draws: Draws) -> Tensor:
        indices = draws.indices(len(latents), rows=settings.rows)
        captions = [caption_variant(emoji_set[index], draws.random) for index in indices]
        clean = latents[indices]
        timesteps = stratified_timesteps(draws, settings.rows)
        noise = torch.randn(clean.shape, generator=draws.generator)
        noisy = sampler.add_noise(clean, noise, timesteps).to(memory_format=torch.channels_last)
        velocity = sampler.get_velocity(clean, noise, timesteps)
        predicted = denoiser(noisy, timesteps, tokenize(tokenizer, captions))
        error = (predicted - velocity).square().mean(dim=(1, 2, 3))
        loss: Tensor = (error * weights[timesteps]).mean()
        return loss

    return train(
        denoiser,
        loss_of,
        LoopSettings(
            steps=settings.steps,
            peak_rate=settings.peak_rate,
            weight_decay=0.01,
            average_decay=0.999,
            seed=settings.seed,
        ),
        checkpoint,
        on_save=on_save,
    )
