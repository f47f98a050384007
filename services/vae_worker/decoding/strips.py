"""Feature maps in strips of rows, and the stages of a decoder on them.

Strips bound the memory of a large picture's decode and the length of its longest chunk
(`docs/decisions/0001-row-strips.md`).

Every operator here gives, strip by strip, the rows that the library's operator gives for the whole
map. Two things couple the rows of a map: a 3x3 convolution needs one row on either side of the
strip (`FeatureMap.rows` gathers them), and a GroupNorm needs the mean and variance of the whole map
(each strip's `Moments` are taken while it is written, `merge_moments` merges them).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.vae_worker.decoding.stages import NormConv, Upsample, activate
from shared.threads import running_on

HALF_PRECISION = (torch.float16, torch.bfloat16)
CONV_HALO = 1
"""Rows that a 3x3 convolution of stride 1 needs above and below its output."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Mean and biased variance per sample and channel over one strip.

    Both are (batch, channels), float32 (float64 for a float64 strip).
    """

    mean: Tensor
    variance: Tensor

    num_pixels: int
    """Of one channel of one sample."""


def strip_moments(strip: Tensor) -> Moments:
    """Return the moments of a strip (batch, channels, rows, width), in at least float32.

    `torch.batch_norm_update_stats` is the library's own fused two-pass kernel for this, some ten
    times faster than `torch.var_mean` on channels_last memory. It also updates running statistics;
    the ones passed here only make it return float32 for a half-precision strip.
    """
    running = None
    if strip.dtype in HALF_PRECISION:
        running = torch.zeros(strip.shape[1], dtype=torch.float32, device=strip.device)
    with running_on(1):  # on several the sums are split, and their last bits differ
        per_sample = [
            torch.batch_norm_update_stats(strip[index : index + 1], running, running, 0.0)
            for index in range(strip.shape[0])
        ]
    return Moments(
        mean=torch.stack([mean for mean, _ in per_sample]),
        variance=torch.stack([variance for _, variance in per_sample]),
        num_pixels=strip.shape[2] * strip.shape[3],
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupStatistics:
    """What a GroupNorm has to know of the whole map, as per-channel (batch, channels) tensors."""

    mean: Tensor
    variance: Tensor


def merge_moments(parts: Sequence[Moments], num_groups: int) -> GroupStatistics:
    """Return the mean and biased variance of each group of channels over all strips.

    The parallel variance formula (Chan, Golub, LeVeque 1979), all parts at once: the variance of
    the union is the weighted mean of the parts' variances and of their squared distances from the
    common mean. A strip's channel is one part of its group.
    """
    means = torch.stack([part.mean for part in parts])
    variances = torch.stack([part.variance for part in parts])
    num_strips, batch, channels = means.shape
    grouped = (num_strips, batch, num_groups, channels // num_groups)
    total = sum(part.num_pixels for part in parts) * (channels // num_groups)
    weights = means.new_tensor([part.num_pixels / total for part in parts]).view(-1, 1, 1, 1)

    means, variances = means.view(grouped), variances.view(grouped)
    mean = (weights * means).sum(dim=(0, 3), keepdim=True)
    variance = (weights * (variances + (means - mean).square())).sum(dim=(0, 3), keepdim=True)
    return GroupStatistics(
        mean=mean.expand(1, *grouped[1:]).reshape(batch, channels),
        variance=variance.expand(1, *grouped[1:]).reshape(batch, channels),
    )


class FeatureMap:
    """A feature map (batch, channels, height, width) as a queue of row strips, top to bottom.

    Whoever computes it appends strips, whoever reads it releases them, so that only the rows still
    needed occupy memory. A map that was computed whole is one strip.
    """

    def __init__(self, *strips: Tensor) -> None:
        self._strips: deque[tuple[int, Tensor]] = deque()
        self._height = 0
        self._moments: list[Moments] = []
        for strip in strips:
            self.append(strip)

    @property
    def height(self) -> int:
        """How many rows have been appended so far, released ones included."""
        return self._height

    @property
    def moments(self) -> Sequence[Moments]:
        """The moments of the strips, where they were asked for."""
        return self._moments

    def append(self, strip: Tensor, *, with_moments: bool = False) -> None:
        """Add the next rows below; take their moments too if a norm in strips will read the map."""
        self._strips.append((self._height, strip))
        self._height += strip.shape[2]
        if with_moments:
            self._moments.append(strip_moments(strip))

    def rows(self, first: int, end: int) -> Tensor:
        """Return rows first to end (exclusive), zeros beyond the map's edges.

        A view where one strip holds them all, else a copy.
        """
        parts = [
            strip[:, :, max(first - top, 0) : end - top]
            for top, strip in self._strips
            if top < end and first < top + strip.shape[2]
        ]
        if first < 0:
            parts.insert(0, torch.zeros_like(parts[0][:, :, first:]))
        if end > self._height:
            parts.append(torch.zeros_like(parts[-1][:, :, self._height - end :]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def whole(self) -> Tensor:
        """Return the whole map; it is kept in one piece from now on."""
        if len(self._strips) > 1:
            self._strips = deque([(0, self.rows(0, self._height))])
        return self._strips[0][1]

    def release(self, before: int) -> None:
        """Let go of the strips that lie wholly above row `before`."""
        while self._strips and self._strips[0][0] + self._strips[0][1].shape[2] <= before:
            self._strips.popleft()

    def share(self) -> FeatureMap:
        """Return a second map of the same strips, which are freed once both have released them."""
        twin = FeatureMap()
        twin._strips = self._strips.copy()
        twin._height = self._height
        return twin


def normalise(strip: Tensor, norm: nn.GroupNorm, statistics: GroupStatistics) -> Tensor:
    """Return the rows of `norm(whole map)` that `strip` holds: a new tensor of its dtype.

    With the statistics known, a GroupNorm is a scale and shift per channel, which is what a
    BatchNorm in evaluation mode is: one fused pass, float32 parameters for half-precision strips.
    """
    dtype = statistics.mean.dtype
    weight = None if norm.weight is None else norm.weight.to(dtype)
    bias = None if norm.bias is None else norm.bias.to(dtype)
    samples = [
        functional.batch_norm(
            strip[index : index + 1],
            statistics.mean[index],
            statistics.variance[index],
            weight,
            bias,
            eps=norm.eps,
        )
        for index in range(strip.shape[0])
    ]
    return samples[0] if len(samples) == 1 else torch.cat(samples)


# --- stages in strips -----------------------------------------------------------------------------

Strippable = NormConv | Upsample
"""The stages that can run strip by strip."""


def strip_of(
    stage: Strippable, source: FeatureMap, statistics: GroupStatistics | None, first: int, end: int
) -> Tensor:
    """Return output rows first to end (exclusive) of a stage.

    Args:
        stage: What to compute.
        source: Its input; the rows from `first_source_row` on must be there.
        statistics: Of the whole input, for a norm; None for an enlargement.
        first: The uppermost row.
        end: The row below the lowest.
    """
    if isinstance(stage, Upsample):
        window = _upsampled_rows(source, first - CONV_HALO, end + CONV_HALO)
    else:
        assert statistics is not None
        window = _normalised_rows(
            source,
            first - CONV_HALO,
            end + CONV_HALO,
            norm=stage.norm,
            statistics=statistics,
            activation=stage.activation,
        )
    conv = stage.conv
    return functional.conv2d(window, conv.weight, conv.bias, padding=(0, CONV_HALO))


def first_source_row(stage: Strippable, row: int) -> int:
    """Return the uppermost input row that a stage's output row `row` reads."""
    return max(row - CONV_HALO, 0) // stage.enlarges


def row_elements(stage: Strippable, width: int) -> int:
    """Return the elements of one output row of `width`, or of its input if those are more."""
    return max(stage.conv.in_channels, stage.conv.out_channels) * width


def _normalised_rows(
    source: FeatureMap,
    first: int,
    end: int,
    *,
    norm: nn.GroupNorm,
    statistics: GroupStatistics,
    activation: Any,
) -> Tensor:
    """Return rows first to end of `activation(norm(map))`, zeros beyond the map's edges."""
    window = activate(activation, normalise(source.rows(first, end), norm, statistics))
    if first < 0:
        window[:, :, :-first] = 0.0
    if end > source.height:
        window[:, :, source.height - end :] = 0.0
    return window


def _upsampled_rows(source: FeatureMap, first: int, end: int) -> Tensor:
    """Return rows first to end of the map enlarged twice (nearest), zeros beyond its edges."""
    top = first // 2
    enlarged = functional.interpolate(source.rows(top, -(-end // 2)), scale_factor=2.0)
    return enlarged[:, :, first - 2 * top : end - 2 * top]
