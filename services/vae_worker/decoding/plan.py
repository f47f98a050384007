"""Where a decode is cut: stages into units (whole, or a strip of rows), units into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Any

from services.vae_worker.decoding.read_stages import read_stages
from services.vae_worker.decoding.stages import Stage
from services.vae_worker.decoding.strips import Strippable, row_elements
from shared.errors import ConfigurationError

MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Granularity:
    """How finely a decode is cut; part of a profile.

    Raises:
        ConfigurationError: A value is out of range.
    """

    num_chunks: int | None = None
    """Chunks of about equal cost, at most as many as there are units; None for one chunk per unit,
    the finest cut and the one whose chunks are worth measuring."""

    max_strip_fraction: float | None = None
    """A stage that costs more than this fraction of the whole decode is cut into row strips that
    each cost at most that (but have at least one row). None cuts along the layers only, whose
    result is the library's bit for bit."""

    max_strip_bytes: int = 32 * MEBIBYTE
    """Where strips are allowed, no strip of one sample's feature map is larger (but it has at least
    one row), whatever it costs: the bound on memory."""

    def __post_init__(self) -> None:
        if self.num_chunks is not None and self.num_chunks < 1:
            raise ConfigurationError(f"num_chunks is {self.num_chunks}; it must be at least 1")
        if self.max_strip_fraction is not None and not 0 < self.max_strip_fraction <= 1:
            raise ConfigurationError(
                f"max_strip_fraction is {self.max_strip_fraction}; it must be in (0, 1]"
            )
        if self.max_strip_bytes < 1:
            raise ConfigurationError(
                f"max_strip_bytes is {self.max_strip_bytes}; it must be at least 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The smallest piece of a decode: some output rows of a stage, or all of them."""

    stage: int
    """Index of the decoder's stage."""

    name: str
    """The stage's name."""

    first_row: int
    end_row: int
    """The row below the last."""

    is_whole: bool
    """Whether the unit is the whole stage, run by the library's kernels."""

    cost: float
    """Its estimated share of the decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What runs between two yields: consecutive units."""

    units: tuple[Unit, ...]

    cost: float
    """The units' summed share of the decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlan:
    """A decode of (latent_height, latent_width) latents, cut into chunks; costs sum to 1."""

    latent_height: int
    latent_width: int
    chunks: tuple[Chunk, ...]

    @property
    def num_chunks(self) -> int:
        """How many times the decode must be advanced."""
        return len(self.chunks)

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units in the order in which they run."""
        return tuple(unit for chunk in self.chunks for unit in chunk.units)


def plan_chunks(
    vae: Any,
    latent_height: int,
    latent_width: int,
    *,
    granularity: Granularity,
    unit_costs: Sequence[float] | None = None,
) -> ChunkPlan:
    """Return a cut of a VAE's decode into chunks of about equal cost.

    Args:
        vae: A diffusers `AutoencoderKL` or `AutoencoderTiny`.
        latent_height: Rows of the latents, at least 1.
        latent_width: Columns of the latents, at least 1.
        granularity: How finely.
        unit_costs: Measured costs of the units in any unit, in place of the estimates from
            operations and bytes: the durations of the chunks of the same plan with
            `num_chunks=None`.

    Raises:
        ConfigurationError: The decoder can't be taken apart, or the number of costs is not that of
            the units, or one is not positive.
    """
    itemsize = next(vae.decoder.parameters()).element_size()
    units = _cut_stages(read_stages(vae), latent_height, latent_width, granularity, itemsize)
    costs = [unit.cost for unit in units] if unit_costs is None else list(unit_costs)
    if len(costs) != len(units):
        raise ConfigurationError(f"{len(costs)} unit costs for a decode of {len(units)} units")
    if min(costs) <= 0:
        raise ConfigurationError(f"a unit cost is {min(costs)}; costs must be positive")
    total = sum(costs)
    units = [replace(unit, cost=cost / total) for unit, cost in zip(units, costs, strict=True)]
    num_chunks = min(granularity.num_chunks or len(units), len(units))
    cuts = balanced_cuts([unit.cost for unit in units], num_chunks)
    return ChunkPlan(
        latent_height=latent_height,
        latent_width=latent_width,
        chunks=tuple(
            Chunk(
                units=tuple(units[first:end]),
                cost=sum(unit.cost for unit in units[first:end]),
            )
            for first, end in pairwise(cuts)
        ),
    )


def _cut_stages(
    stages: Sequence[Stage],
    latent_height: int,
    latent_width: int,
    granularity: Granularity,
    itemsize: int,
) -> list[Unit]:
    """Return the units of all stages, with costs in operations."""
    sizes = []
    height, width = latent_height, latent_width
    for stage in stages:
        height, width = height * stage.enlarges, width * stage.enlarges
        sizes.append((height, width, stage.cost(height * width, itemsize)))
    total = sum(cost for _, _, cost in sizes)

    units = []
    for index, (stage, (height, width, cost)) in enumerate(zip(stages, sizes, strict=True)):
        num_strips = 1
        if isinstance(stage, Strippable) and granularity.max_strip_fraction is not None:
            by_cost = cost / total / granularity.max_strip_fraction
            by_memory = row_elements(stage, width) * height * itemsize / granularity.max_strip_bytes
            num_strips = min(max(ceil(by_cost), ceil(by_memory)), height)
        edges = [height * strip // num_strips for strip in range(num_strips + 1)]
        units += [
            Unit(
                stage=index,
                name=stage.name,
                first_row=first,
                end_row=end,
                is_whole=num_strips == 1,
                cost=cost * (end - first) / height,
            )
            for first, end in pairwise(edges)
        ]
    return units


def balanced_cuts(costs: Sequence[float], num_chunks: int) -> list[int]:
    """Return where to cut a sequence into `num_chunks` parts so that the dearest is cheapest.

    The linear partition problem, by bisection on the dearest part's cost.

    Args:
        costs: What each item costs, none negative.
        num_chunks: From 1 to the number of items.

    Returns:
        The num_chunks + 1 indices from 0 to len(costs) between which the parts lie; none is empty.
    """
    low, high = max(costs), sum(costs)
    cuts = _cuts_within(high, costs, num_chunks)
    while high - low > 1e-6 * high:
        limit = (low + high) / 2
        candidate = _cuts_within(limit, costs, num_chunks)
        if len(candidate) <= num_chunks + 1:
            cuts, high = candidate, limit
        else:
            low = limit
    return cuts


def _cuts_within(limit: float, costs: Sequence[float], num_chunks: int) -> list[int]:
    """Return cuts into `num_chunks` parts, or as few more as let each cost at most `limit`."""
    cuts = [0]
    filled = 0.0
    for index, cost in enumerate(costs):
        must_cut = len(costs) - index <= num_chunks - len(cuts)
        if index > cuts[-1] and (filled + cost > limit or must_cut):
            cuts.append(index)
            filled = 0.0
        filled += cost
    return [*cuts, len(costs)]
