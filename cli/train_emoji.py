"""`synerdiff train-emoji`: trains the embedded model from nothing, or goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.characters import CharacterSettings
from training.diffusion import DiffusionSettings
from training.drawing import DrawingSettings
from training.stages import Run, Stage, run_stage
from training.vae import VaeSettings

MODEL_FOLDER = Path("models/emoji")
CONTACT_SHEET = Path("docs/emoji_contact_sheet.png")


def train_emoji(
    stages: Annotated[
        list[Stage] | None, typer.Argument(help="The stages to run, in order; all by default.")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Checkpoints; the same folder resumes a run.")
    ] = Path("training-run"),
    model: Annotated[Path, typer.Option(help="The diffusers folder to write.")] = MODEL_FOLDER,
    contact_sheet: Annotated[Path, typer.Option(help="The sheet to draw.")] = CONTACT_SHEET,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Go on from this model's weights, by default without the stages vae and unet."
        ),
    ] = None,
    vae_steps: Annotated[int, typer.Option(min=1)] = VaeSettings().steps,
    decoder_steps: Annotated[int, typer.Option(min=1)] = VaeSettings().decoder_steps,
    unet_steps: Annotated[int, typer.Option(min=1)] = DiffusionSettings().steps,
    character_steps: Annotated[int, typer.Option(min=1)] = CharacterSettings().steps,
    drawing_steps: Annotated[int, typer.Option(min=1)] = DrawingSettings().steps,
    rows: Annotated[
        int, typer.Option(min=1, help="Captioned pictures per UNet step and process.")
    ] = DiffusionSettings().rows,
    peak_rate: Annotated[
        float, typer.Option(help="The UNet's highest learning rate.")
    ] = DiffusionSettings().peak_rate,
    drawing_rate: Annotated[
        float, typer.Option(help="Its highest learning rate in the stage `drawing`.")
    ] = DrawingSettings().peak_rate,
    processes: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 2,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the embedded emoji model; the same command resumes an interrupted run."""
    run = Run(
        folder=folder,
        model_folder=model,
        contact_sheet=contact_sheet,
        start_from=start_from,
        vae=VaeSettings(steps=vae_steps, decoder_steps=decoder_steps, seed=seed),
        characters=CharacterSettings(steps=character_steps, seed=seed),
        drawing=DrawingSettings(steps=drawing_steps, peak_rate=drawing_rate, seed=seed),
        diffusion=DiffusionSettings(steps=unet_steps, rows=rows, peak_rate=peak_rate, seed=seed),
    )
    known = {Stage.VAE, Stage.UNET} if start_from is not None else set()
    chosen = stages or [stage for stage in Stage if stage not in known]
    for stage in chosen:
        print(f"== {stage}", flush=True)
        run_stage(stage, run, processes=processes)


if __name__ == "__main__":
    typer.run(train_emoji)
