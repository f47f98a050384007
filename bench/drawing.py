"""Makes many pictures in one process with the workers' own denoiser and decoder.

What `bench fidelity` and `bench skip_search` draw with: the rule that decides which steps may be
skipped, the extrapolation and the update are the product's, only the services around are missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from services.unet_worker.backends.eager import EagerBackend
from services.unet_worker.backends.protocol import Backend
from services.unet_worker.denoising.denoiser import Denoiser, FinishedLatents
from services.unet_worker.families.protocol import Family
from services.vae_worker.model import Decoder
from shared.guidance_skip import SkipParameters
from shared.messages import HeldRequest, ImageParameters, SlotRow

MAX_DRAWINGS = 32
"""Requests in a forward, so that a batch is large and its memory small."""

_ATTEMPT = "1-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What to draw."""

    caption: str
    picture: int
    """Index of the reference that the caption names."""
    seed: int
    sampler: str = "ddim"
    num_inference_steps: int = 25
    guidance_scale: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A way to draw a case."""

    case: Case
    level: str = "off"
    """Its `guidance_skip`."""
    skips: frozenset[int] | None = None
    """The steps at which skipping is asked for, None for all; the level decides whether it is
    granted."""
    unguided_from: int | None = None
    """The step from which on guidance is dropped, None for never."""


def anywhere(parameters: SkipParameters) -> SkipParameters:
    """Return a level with the same extrapolation that may skip at every step from the third on."""
    return replace(
        parameters, warm_up=0.0, first_gap=1.0, gap_growth=0.0, max_gap=1.0, max_error=1e9
    )


class Studio:
    """A denoiser and a decoder on the default size of the model.

    Args:
        family: To denoise with.
        decoder: To decode with.
        folder: The model's.
        levels: What `Drawing.level` may be.
        backend: To run forwards with; None runs them as diffusers does.
    """

    def __init__(
        self,
        family: Family,
        decoder: Decoder,
        folder: Path,
        levels: Mapping[str, SkipParameters | None],
        backend: Backend | None = None,
    ) -> None:
        self._decoder = decoder
        self._model_id = folder.name
        self._height, self._width = family.facts.default_height, family.facts.default_width
        backend = backend or EagerBackend(family)
        self._denoiser = Denoiser(family, backend, max_requests=MAX_DRAWINGS, skip_levels=levels)

    def denoise(self, drawings: Sequence[Drawing]) -> list[FinishedLatents]:
        """Return the latents of each drawing, in order."""
        finished: list[FinishedLatents] = []
        for first in range(0, len(drawings), MAX_DRAWINGS):
            finished += self._denoise_together(drawings[first : first + MAX_DRAWINGS])
        return finished

    @torch.inference_mode()
    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Return pictures (N, 3, height, width) in [0, 1] of latents (1, C, h, w)."""
        vae = self._decoder.vae
        scaled = torch.cat(list(latents)).to(self._decoder.dtype) / vae.config.scaling_factor
        pictures = [vae.decode(part, return_dict=False)[0] for part in scaled.split(8)]
        return (torch.cat(pictures).float().cpu() / 2 + 0.5).clamp(0, 1)

    def _denoise_together(self, drawings: Sequence[Drawing]) -> list[FinishedLatents]:
        for number, drawing in enumerate(drawings):
            self._denoiser.admit(str(number), _ATTEMPT, self._parameters(drawing))
        finished: dict[str, FinishedLatents] = {}
        while held := self._denoiser.held():
            for request in held:
                if drawings[int(request.request_id)].unguided_from == request.step_index:
                    self._drop_guidance(request)
            rows = [self._row(request, drawings[int(request.request_id)]) for request in held]
            result = self._denoiser.run(rows)
            if result.failures:
                raise RuntimeError(result.failures[0].reason)
            finished |= {latents.request_id: latents for latents in result.finished}
        return [finished[str(number)] for number in range(len(drawings))]

    def _row(self, held: HeldRequest, drawing: Drawing) -> SlotRow:
        return SlotRow(
            request_id=held.request_id,
            attempt=held.attempt,
            step_index=held.step_index,
            skip=drawing.skips is None or held.step_index in drawing.skips,
        )

    def _drop_guidance(self, held: HeldRequest) -> None:
        """Go on unguided, as a request that moves to another worker would."""
        state = self._denoiser.export_state(held.request_id, held.attempt)
        if state is None:
            raise ValueError("a sampler without a linear table can't drop its guidance midway")
        parameters = replace(state.parameters, guidance_scale=1.0)
        self._denoiser.import_state(replace(state, parameters=parameters))

    def _parameters(self, drawing: Drawing) -> ImageParameters:
        case = drawing.case
        return ImageParameters(
            prompt=case.caption,
            negative_prompt="",
            seed=case.seed,
            height=self._height,
            width=self._width,
            num_inference_steps=case.num_inference_steps,
            guidance_scale=case.guidance_scale,
            sampler=case.sampler,
            guidance_skip=drawing.level,
            output_format="png",
            output_compression=100,
            model=self._model_id,
        )
