"""The VAE decode as a generator: it yields between chunks and returns the whole decode's image.

Chunks follow the decoder's layers, which is exact and free, and rows inside the large layers where
the plan asks for it, which bounds both the longest chunk and the memory. Statistics of a GroupNorm
are always those of the whole map, so strips leave no seams.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from services.vae_worker.decoding.plan import ChunkPlan, Unit
from services.vae_worker.decoding.read_stages import read_stages
from services.vae_worker.decoding.stages import NormConv, Stage, add_residual, project
from services.vae_worker.decoding.strips import (
    FeatureMap,
    GroupStatistics,
    Strippable,
    first_source_row,
    merge_moments,
    strip_of,
)
from shared.errors import ConfigurationError


@torch.inference_mode()
def decode_chunks(vae: Any, latents: Tensor, *, plan: ChunkPlan) -> Generator[int, None, Tensor]:
    """Decode latents chunk by chunk, as diffusers' pipelines do with the whole `vae.decode`.

    Each `next()` runs one chunk; the last of the plan's `num_chunks` ends the generator, whose
    value (`StopIteration.value`, or that of `yield from`) is the image. Closing the generator frees
    all that the decode holds. On an accelerator a chunk is launched, not waited for: synchronise
    where its end matters. The library's own tiling and slicing switches have no effect here.

    Args:
        vae: A diffusers `AutoencoderKL` or `AutoencoderTiny` in evaluation mode.
        latents: (batch, latent_channels, latent_height, latent_width) as the denoising loop leaves
            them, scaling factor included, in any float dtype and memory format.
        plan: From `plan_chunks` for this VAE and these latents' size; batch at will.

    Yields:
        The number of chunks done, from 1 to num_chunks - 1.

    Returns:
        The image (batch, 3, height, width) in the decoder's dtype, nominally in [-1, 1].

    Raises:
        ConfigurationError: The plan is one for other latents or another decoder.
    """
    stages = read_stages(vae)
    _check_plan(plan, stages, latents)
    decode = _Decode(stages, plan.units, latents)
    del latents
    for done, chunk in enumerate(plan.chunks):
        if done:
            yield done
        for unit in chunk.units:
            decode.run(unit)
    return decode.output.whole()


def _check_plan(plan: ChunkPlan, stages: Sequence[Stage], latents: Tensor) -> None:
    if tuple(latents.shape[2:]) != (plan.latent_height, plan.latent_width):
        raise ConfigurationError(
            f"the chunk plan is for latents of {plan.latent_height} x {plan.latent_width}, "
            f"these are {latents.shape[2]} x {latents.shape[3]}"
        )
    planned = dict.fromkeys((unit.stage, unit.name) for unit in plan.units)
    if list(planned) != [(index, stage.name) for index, stage in enumerate(stages)]:
        raise ConfigurationError("the chunk plan is for a decoder of other layers")


class _Decode:
    """A decode under way: the current stage's input and output, and a resnet's open residual."""

    def __init__(self, stages: Sequence[Stage], units: Sequence[Unit], latents: Tensor) -> None:
        self._stages = stages
        self._is_striped = {unit.stage for unit in units if not unit.is_whole}
        self._source = FeatureMap()
        self._residual = FeatureMap()
        self._statistics: GroupStatistics | None = None
        self.output = FeatureMap(latents)

    def run(self, unit: Unit) -> None:
        """Compute the unit's rows and let go of the rows that nothing will read again."""
        stage = self._stages[unit.stage]
        if unit.first_row == 0:
            self._begin(stage, is_striped=not unit.is_whole)
        rows = (unit.first_row, unit.end_row)
        if isinstance(stage, Strippable) and not unit.is_whole:
            features = strip_of(stage, self._source, self._statistics, *rows)
        else:
            features = stage.whole(self._source.whole())
        if isinstance(stage, NormConv):
            if stage.shortcut is not None:
                self._residual.append(project(stage.shortcut, self._source.rows(*rows)))
            if stage.closes_residual:
                features = add_residual(features, self._residual.rows(*rows), stage.divisor)
                self._residual.release(unit.end_row)
        if isinstance(stage, Strippable):
            self._source.release(first_source_row(stage, unit.end_row))
        self.output.append(features, with_moments=self._next_needs_moments(unit.stage))

    def _begin(self, stage: Stage, *, is_striped: bool) -> None:
        self._source, self.output = self.output, FeatureMap()
        self._statistics = None
        if isinstance(stage, NormConv):
            if is_striped:
                self._statistics = merge_moments(self._source.moments, stage.norm.num_groups)
            if stage.opens_residual:
                self._residual = self._source.share() if stage.shortcut is None else FeatureMap()

    def _next_needs_moments(self, stage: int) -> bool:
        following = stage + 1
        return following in self._is_striped and isinstance(self._stages[following], NormConv)
