"""The stages of a training run, each a function of the run's folder and settings.

- data: tokenizer and rendered pictures
- vae: the autoencoder
- latents: every picture's latents, normalised, and the autoencoder that speaks them
- characters: the text encoder, which learns the emoji themselves
- unet: the UNet
- drawing: the UNet again, on what it meets when it draws
- decoder: the autoencoder's decoder again, on the latents that the UNet knows and draws
- export: the diffusers folder, its references and a contact sheet
"""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import CLIPTextModel, CLIPTokenizer

from training.captions import vocabulary_texts
from training.characters import (
    CharacterSettings,
    share_understood,
    train_characters,
    with_characters,
)
from training.contact_sheet import SHOWCASE, save_contact_sheet
from training.diffusion import (
    Denoiser,
    DiffusionSettings,
    build_denoiser,
    train_diffusion,
)
from training.drawing import DrawingCourse, DrawingSettings, train_drawing
from training.emoji_set import load_emoji_set
from training.export import build_pipeline, export_model
from training.loop import load_checkpoint, save_checkpoint
from training.pictures import render_all
from training.tokenizer import train_tokenizer
from training.vae import (
    VaeSettings,
    build_vae,
    encode_all,
    fold_normalisation,
    reconstruction_psnr_db,
    train_decoder,
    train_vae,
)

PREVIEW_EVERY_S = 900.0
PSNR_STRIDE = 5  # a quick look; the export measures all


class Stage(enum.StrEnum):
    """One stage of the training, in the order in which they run."""

    DATA = "data"
    VAE = "vae"
    LATENTS = "latents"
    CHARACTERS = "characters"
    UNET = "unet"
    DRAWING = "drawing"
    DECODER = "decoder"
    EXPORT = "export"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where a training run keeps its state, what it makes, and how."""

    folder: Path
    model_folder: Path
    contact_sheet: Path
    start_from: Path | None = None  # a model folder to go on from, in place of fresh weights
    vae: VaeSettings = field(default_factory=VaeSettings)
    characters: CharacterSettings = field(default_factory=CharacterSettings)
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    drawing: DrawingSettings = field(default_factory=DrawingSettings)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies."""
        return self.folder / "tokenizer"

    def path(self, name: str) -> Path:
        """Return the file that holds the state called `name`."""
        return self.folder / f"{name}.pt"

    def load(self, name: str) -> dict[str, Any]:
        """Read a stage's checkpoint.

        Raises:
            FileNotFoundError: an earlier stage has not run.

        """
        state = load_checkpoint(self.path(name))
        if state is None:
            raise FileNotFoundError(f"{self.path(name)} is missing: run the earlier stages first")
        return state

    def pixels(self) -> Tensor:
        """Return the training pictures (N, 3, 128, 128) uint8."""
        pixels: Tensor = self.load("pictures")["pixels"]
        return pixels

    def tokenizer(self) -> CLIPTokenizer:
        """Return the run's own tokenizer."""
        return CLIPTokenizer.from_pretrained(self.tokenizer_folder)

    def fresh_denoiser(self) -> Denoiser:
        """Return the weights to start from: new ones, or those of `start_from`."""
        torch.manual_seed(self.diffusion.seed)
        if self.start_from is None:
            return build_denoiser(self.tokenizer(), load_emoji_set())
        text_encoder = with_characters(
            CLIPTextModel.from_pretrained(self.start_from / "text_encoder", dtype=torch.float32),
            CLIPTokenizer.from_pretrained(self.start_from / "tokenizer"),
            self.tokenizer(),
            load_emoji_set(),
        )
        unet = UNet2DConditionModel.from_pretrained(self.start_from / "unet")
        return Denoiser(text_encoder, unet)

    def normalised_vae(self) -> AutoencoderKL:
        """Return the autoencoder with the best decoder there is so far."""
        vae = build_vae()
        vae.load_state_dict(self.load("latents")["vae"])
        decoder = load_checkpoint(self.path("decoder"))
        if decoder is not None:
            vae.load_state_dict(decoder["average"])
        return vae

    def literate_denoiser(self) -> Denoiser:
        """Return the weights to start from, with a text encoder that knows the characters."""
        denoiser = self.fresh_denoiser()
        denoiser.text_encoder.load_state_dict(self.load("characters")["module"])
        return denoiser

    def trained_denoiser(self) -> Denoiser:
        """Return the averaged weights of the UNet's stage, where it ran."""
        denoiser = self.literate_denoiser()
        if self.start_from is None or self.path("unet").exists():
            denoiser.load_state_dict(self.load("unet")["average"])
        return denoiser

    def drawing_denoiser(self) -> Denoiser:
        """Return the averaged weights of the last stage of the UNet that ran."""
        if not self.path("drawing").exists():
            return self.trained_denoiser()
        denoiser, latents = self.literate_denoiser(), self.load("latents")["latents"]
        course = DrawingCourse(denoiser, underway=self.drawing.underway, latents=latents)
        course.load_state_dict(self.load("drawing")["average"])
        return denoiser


def run_stage(stage: Stage, run: Run, *, processes: int) -> None:
    """Run one stage; those that train by gradients in `processes` processes at once.

    On a CPU two processes of one thread each get more out of two cores than two threads do.
    """
    if processes > 1 and stage in _LEARNING:
        rendezvous = run.folder / f"{stage}.rendezvous"
        rendezvous.unlink(missing_ok=True)
        spawn(  # type: ignore[no-untyped-call]
            _train_together, (stage, run, processes, rendezvous), nprocs=processes
        )
    else:
        _STAGES[stage](run)


def _train_together(rank: int, stage: Stage, run: Run, processes: int, rendezvous: Path) -> None:
    """Run a stage as one of several processes that average their gradients."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous.absolute()}", rank=rank, world_size=processes
    )
    _STAGES[stage](run)
    dist.destroy_process_group()


def _run_data(run: Run) -> None:
    emoji_set = load_emoji_set()
    train_tokenizer(vocabulary_texts(emoji_set), run.tokenizer_folder)
    save_checkpoint({"pixels": render_all(emoji_set)}, run.path("pictures"))
    print(f"{len(emoji_set)} pictures, {len(run.tokenizer())} tokens")


def _run_vae(run: Run) -> None:
    train_vae(run.pixels(), run.vae, run.path("vae"))


def _run_latents(run: Run) -> None:
    pixels = run.pixels()
    if run.start_from is None:
        vae = build_vae()
        vae.load_state_dict(run.load("vae")["average"])
        latents = encode_all(vae, pixels)
        mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        fold_normalisation(vae, mean, std)
        latents = (latents - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    else:
        vae = AutoencoderKL.from_pretrained(run.start_from / "vae")
        latents = encode_all(vae, pixels)
    save_checkpoint({"latents": latents, "vae": vae.state_dict()}, run.path("latents"))
    psnr_db = reconstruction_psnr_db(vae, pixels[::PSNR_STRIDE])
    print(f"VAE: {psnr_db:.2f} dB on every {PSNR_STRIDE}th picture, whole")


def _run_characters(run: Run) -> None:
    tokenizer, emoji_set = run.tokenizer(), load_emoji_set()
    text_encoder = train_characters(
        run.fresh_denoiser().text_encoder,
        tokenizer,
        emoji_set=emoji_set,
        settings=run.characters,
        checkpoint=run.path("characters"),
    )
    share = share_understood(text_encoder, tokenizer, emoji_set)
    print(f"characters: {share:.4f} nearest to their own name")


def _run_unet(run: Run) -> None:
    train_diffusion(
        run.literate_denoiser(),
        run.tokenizer(),
        emoji_set=load_emoji_set(),
        latents=run.load("latents")["latents"],
        settings=run.diffusion,
        checkpoint=run.path("unet"),
        on_save=_preview_now_and_then(run),
    )


def _run_drawing(run: Run) -> None:
    train_drawing(
        run.trained_denoiser(),
        run.tokenizer(),
        emoji_set=load_emoji_set(),
        latents=run.load("latents")["latents"],
        settings=run.drawing,
        checkpoint=run.path("drawing"),
        on_save=_preview_now_and_then(run),
    )


def _preview_now_and_then(run: Run) -> Callable[[nn.Module, int], None]:
    """Return what draws a sheet at a checkpoint, unless it drew one a short while ago."""
    shown_at = time.monotonic()

    def show(average: nn.Module, step: int) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at < PREVIEW_EVERY_S:
            return
        denoiser = average.denoiser if isinstance(average, DrawingCourse) else average
        _draw_showcase(run, denoiser, run.folder / f"sheet-{step:06d}.png", count=16)
        shown_at = time.monotonic()

    return show


def _run_decoder(run: Run) -> None:
    vae = build_vae()
    state = run.load("latents")
    vae.load_state_dict(state["vae"])
    train_decoder(
        vae,
        latents=state["latents"],
        drawn=run.load("drawing")["module"]["drawn"],
        pixels=run.pixels(),
        settings=run.vae,
        checkpoint=run.path("decoder"),
    )


def _run_export(run: Run) -> None:
    vae, denoiser, pixels = run.normalised_vae(), run.drawing_denoiser(), run.pixels()
    psnr_db = reconstruction_psnr_db(vae, pixels)
    print(f"VAE: {psnr_db:.2f} dB on whole pictures")
    _draw_showcase(run, denoiser, run.contact_sheet, count=len(SHOWCASE))
    pipeline = build_pipeline(vae, denoiser, run.tokenizer())
    export_model(pipeline, load_emoji_set(), pixels, run.model_folder)


def _draw_showcase(run: Run, denoiser: nn.Module, path: Path, *, count: int) -> None:
    assert isinstance(denoiser, Denoiser)
    pipeline = build_pipeline(run.normalised_vae(), denoiser, run.tokenizer())
    captions = list(SHOWCASE[:: len(SHOWCASE) // count][:count])
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(
        captions, num_inference_steps=25, guidance_scale=5.0, generator=generator
    ).images
    save_contact_sheet(pictures, captions, path)


_STAGES: dict[Stage, Callable[[Run], None]] = {
    Stage.DATA: _run_data,
    Stage.VAE: _run_vae,
    Stage.LATENTS: _run_latents,
    Stage.CHARACTERS: _run_characters,
    Stage.UNET: _run_unet,
    Stage.DRAWING: _run_drawing,
    Stage.DECODER: _run_decoder,
    Stage.EXPORT: _run_export,
}

_LEARNING = frozenset(_STAGES) - {Stage.DATA, Stage.LATENTS, Stage.EXPORT}
