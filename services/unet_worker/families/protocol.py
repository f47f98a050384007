"""What a family is: all that differs from one kind of diffusers pipeline to another.

A family is a loaded model that knows its own parts. The rest of the worker handles *rows*: a
sample, a timestep and the row's conditions, by name, go into the network, a prediction like the
sample comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from shared.errors import ConfigurationError
from shared.latents_format import LatentsFormat
from shared.messages import ImageParameters

Conditions = Mapping[str, torch.Tensor]
"""Tensors that rows are conditioned on, by the names and in the order of `Family.conditions`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionSpec:
    """One of the tensors that a row is conditioned on."""

    shape: tuple[int, ...]
    """Of a single row."""

    dtype: torch.dtype
    """As the network takes it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoding:
    """A request's conditions: values of `Family.conditions`, each without a row dimension."""

    negative: Conditions
    """For the row that guidance leads away from; the positive ones where there is no such row."""

    positive: Conditions
    """For the row that guidance leads to."""

    warnings: tuple[str, ...]
    """What was left out of the request, in words for the client."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InitialState:
    """Where a request's denoising begins."""

    latents: torch.Tensor
    """(C, h, w), at the noise level of the first step."""

    step_index: int
    """The first forward that is run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What clients may ask of a model."""

    default_height: int
    """Pixels, as the model was trained."""

    default_width: int
    """Pixels, as the model was trained."""

    side_multiple: int
    """Pixels that both sides must be a multiple of."""

    max_prompt_tokens: int
    """Without the two markers that begin and end every prompt."""

    prediction_type: str
    """What the network predicts: "epsilon", "v_prediction" or "sample"."""

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Raise ConfigurationError unless each (height, width) in pixels can be generated."""
        for height, width in sizes:
            if height % self.side_multiple or width % self.side_multiple or not height * width:
                raise ConfigurationError(
                    f"a size to warm up is {width}x{height}: "
                    f"both sides must be multiples of {self.side_multiple}"
                )


class Family(Protocol):
    """A loaded model, behind what all kinds of models have in common."""

    facts: ModelFacts
    """What clients may ask of it."""

    latents_format: LatentsFormat
    """What its latents are to a VAE."""

    conditions: Mapping[str, ConditionSpec]
    """The tensors that a row is conditioned on, in the order in which the network takes them."""

    network: torch.nn.Module
    """Predicts: called with (sample, timestep, conditions), it returns a prediction of the sample's
    shape. Sample (rows, C, h, w) in `dtype`, timestep (rows,) in float32, each condition (rows,
    *shape). No row of it depends on another. A backend decides how it is run."""

    noise_scheduler: Any
    """The folder's diffusers scheduler, from whose configuration all samplers are made."""

    device: torch.device
    """Where the network and the encoders are."""

    dtype: torch.dtype
    """What the network computes in."""

    def is_guided(self, parameters: ImageParameters) -> bool:
        """Return whether a step of the request needs a negative row."""

    def encode(self, parameters: ImageParameters) -> Encoding:
        """Return what the request's rows are conditioned on."""

    def latents_shape(self, parameters: ImageParameters) -> tuple[int, int, int]:
        """Return (C, h, w) of the request's latents."""

    def initial_state(
        self, parameters: ImageParameters, noise: torch.Tensor, init_noise_sigma: float
    ) -> InitialState:
        """Return where the request begins.

        Args:
            parameters: Of the request.
            noise: The first tensor of the request's own generator, (C, h, w), float32.
            init_noise_sigma: The sampler's noise level before its first step.
        """

    def batch_key(self, parameters: ImageParameters) -> str:
        """Return a word that requests share if their rows can share a forward."""


def network_inputs(
    family: Family, sample: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
) -> tuple[torch.Tensor, ...]:
    """Return the network's inputs one after another, in its dtype, `channels_last`."""
    sample = sample.to(family.dtype, memory_format=torch.channels_last)
    return (sample, timestep, *(conditions[name] for name in family.conditions))
