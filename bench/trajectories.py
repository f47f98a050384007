"""Records what the UNet says at every step of fully guided requests, to try estimators on.

An estimate of a skipped step's guidance direction can be compared with the true one without any
further forward. What an error at a step does to the final latents is measured once, by requests
that skip that step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.drawing import Case, Drawing, Studio
from services.unet_worker.backends.eager import EagerBackend
from services.unet_worker.families.protocol import Conditions, Family
from services.vae_worker.model import Decoder
from shared.guidance_skip import SkipParameters


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectories:
    """Fully guided requests of one sampler, number of steps and scale."""

    cases: tuple[Case, ...]
    uncond: Tensor
    """(steps, cases, C, h, w): the UNet's prediction without the prompt."""
    text: Tensor
    """The same with the prompt."""
    latents: Tensor
    """(cases, C, h, w): the final ones."""

    @property
    def num_steps(self) -> int:
        """Return the UNet forwards of each request."""
        return self.text.shape[0]

    def first(self, count: int) -> Trajectories:
        """Return those of the first cases."""
        return Trajectories(
            cases=self.cases[:count],
            uncond=self.uncond[:, :count],
            text=self.text[:, :count],
            latents=self.latents[:count],
        )

    @property
    def directions(self) -> Tensor:
        """Return the guidance of every step, (steps, cases, C, h, w)."""
        return self.text - self.uncond


class _Recorder(EagerBackend):
    """A backend that keeps what the network predicts."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self.said: list[Tensor] = []

    def predict(self, sample: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Return the network's prediction."""
        prediction = super().predict(sample, timestep, conditions)
        self.said.append(prediction.cpu())
        return prediction


def record(family: Family, decoder: Decoder, folder: Path, cases: Sequence[Case]) -> Trajectories:
    """Run the cases in full, in one batch; they share their sampler and number of steps."""
    recorder = _Recorder(family)
    studio = Studio(family, decoder, folder, {"off": None}, recorder)
    finished = studio.denoise([Drawing(case=case) for case in cases])
    said = torch.stack(recorder.said)  # negative rows first
    return Trajectories(
        cases=tuple(cases),
        uncond=said[:, : len(cases)],
        text=said[:, len(cases) :],
        latents=torch.cat([drawn.latents for drawn in finished]),
    )


def measure_gains(
    family: Family,
    decoder: Decoder,
    folder: Path,
    full: Trajectories,
    *,
    level: SkipParameters,
    steps: Sequence[int],
) -> dict[int, float]:
    """Return by skipped step |final latents - full| / |guidance's error|.

    It is the root mean square over the cases.

    Args:
        family: Of the model.
        decoder: Of the same model.
        folder: The model's.
        full: Requests in full, which are compared with.
        level: Skips anywhere, and reuses the last direction.
        steps: At which to skip, each by itself.
    """
    studio = Studio(family, decoder, folder, {"off": None, "one": level})
    gains = {}
    for step in steps:
        drawings = [Drawing(case=case, level="one", skips=frozenset({step})) for case in full.cases]
        latents = torch.cat([drawn.latents for drawn in studio.denoise(drawings)])
        directions = full.directions
        scales = torch.tensor([case.guidance_scale - 1 for case in full.cases])
        wrong = (directions[step - 1] - directions[step]) * scales.view(-1, 1, 1, 1)
        gains[step] = ((latents - full.latents).square().mean() / wrong.square().mean()).sqrt()
    return {step: float(gain) for step, gain in gains.items()}
