"""Reads a sampler's update off diffusers' own scheduler, as one row of numbers per forward.

Most samplers are linear: with x the latents, eps the (guided) model output and z fresh noise,

    x' = a x + b eps + carry + d z,        carry' = e x + f eps.

`carry` is what a forward already contributes to the update after its own; with it two-step methods
(DPM-Solver++ 2M, Heun) have the same form as one-step methods (where e = f = 0). The numbers are
found by feeding the scheduler unit vectors: its arithmetic is elementwise, so every element of a
tensor is an experiment of its own. Elements with random values run along as witnesses. Where the
outputs are not what the numbers predict (clipping, thresholding, a longer memory), the sampler has
no such table and needs a scheduler instance per request.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

COLUMNS = ("timestep", "input_scale", "a", "b", "d", "e", "f")

_NUM_WITNESSES = 16
_WITNESS_SCALE = 4.0  # beyond the range of any clipping
_TOLERANCE = 1e-4  # relative to the summed magnitudes; diffusers rounds to float32 here and there


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CoefficientTable:
    """A sampler at a number of steps.

    rows: float32 on the CPU, shape (num_forwards, len(COLUMNS)). draws_noise: which forwards draw
    noise. init_noise_sigma: factor of the initial noise. is_linear: False where only the timesteps
    hold and the update needs a scheduler instance.
    """

    rows: torch.Tensor
    draws_noise: tuple[bool, ...]
    init_noise_sigma: float
    is_linear: bool

    @property
    def num_forwards(self) -> int:
        """UNet forwards of a request; not always its steps (PNDM: 26 for 25)."""
        return self.rows.shape[0]


class NotLinearError(Exception):
    """The scheduler's update is not of the form above."""


def step_arguments(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """What `StableDiffusionPipeline` passes to `scheduler.step` beside the tensors."""
    accepted = inspect.signature(scheduler.step).parameters
    arguments = {"eta": 0.0, "generator": generator}
    return {name: value for name, value in arguments.items() if name in accepted}


def read_table(scheduler: Any) -> CoefficientTable:
    """The table of a scheduler after `set_timesteps`; the instance is used up.

    Raises:
        NotLinearError: The update is not of the form.
        Exception: Whatever the scheduler raises at these settings.
    """
    init_noise_sigma = float(scheduler.init_noise_sigma)
    timesteps = scheduler.timesteps.double().cpu()
    run = _Experiment(len(timesteps))
    run.perform(scheduler)
    columns = run.analyse()
    return CoefficientTable(
        rows=torch.stack([timesteps, *columns], dim=1).float(),
        draws_noise=tuple(run.draws_noise),
        init_noise_sigma=init_noise_sigma,
        is_linear=True,
    )


def rehearse(scheduler: Any) -> CoefficientTable:
    """Run a scheduler after `set_timesteps` as the pipeline would; the instance is used up.

    Returns:
        A table with its timesteps, for a sampler whose update is not linear.

    Raises:
        ValueError: The latents became non-finite.
        Exception: Whatever the scheduler raises at these settings.
    """
    generator = torch.Generator().manual_seed(0)
    arguments = step_arguments(scheduler, generator)
    init_noise_sigma = float(scheduler.init_noise_sigma)
    x = torch.randn(1, 1, 4, 4, generator=generator) * init_noise_sigma
    timesteps = scheduler.timesteps
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(scaled * 0.5, timestep, x, **arguments, return_dict=False)[0]
    if not torch.isfinite(x).all():
        raise ValueError("the latents become non-finite")
    rows = torch.zeros(len(timesteps), len(COLUMNS))
    rows[:, 0] = timesteps.float().cpu()
    return CoefficientTable(
        rows=rows,
        draws_noise=(False,) * len(timesteps),
        init_noise_sigma=init_noise_sigma,
        is_linear=False,
    )


class _Experiment:
    """Inputs and outputs of every forward, one row of elements each, in float64.

    Elements 2i and 2i + 1 are 1 in the latents and in the model output of forward i, element 2n is
    1 in every noise, the rest are witnesses.
    """

    def __init__(self, num_forwards: int) -> None:
        self._num_forwards = num_forwards
        num_elements = 2 * num_forwards + 1 + _NUM_WITNESSES
        generator = torch.Generator().manual_seed(0)

        def inputs() -> torch.Tensor:
            elements = torch.zeros(num_forwards, num_elements, dtype=torch.float64)
            witnesses = torch.randn(num_forwards, _NUM_WITNESSES, generator=generator)
            elements[:, -_NUM_WITNESSES:] = witnesses * _WITNESS_SCALE
            return elements

        self._x, self._eps, self._z = inputs(), inputs(), inputs()
        forwards = torch.arange(num_forwards)
        self._x[forwards, 2 * forwards] = 1.0
        self._eps[forwards, 2 * forwards + 1] = 1.0
        self._z[:, 2 * num_forwards] = 1.0
        self._scaled = torch.zeros_like(self._x)
        self._stepped = torch.zeros_like(self._x)
        self.draws_noise: list[bool] = []

    def perform(self, scheduler: Any) -> None:
        """Run the scheduler once, on fresh inputs at every forward."""
        arguments = step_arguments(scheduler, torch.Generator())
        for i, timestep in enumerate(scheduler.timesteps):
            x, eps, z = (part[i].reshape(1, 1, 1, -1) for part in (self._x, self._eps, self._z))
            with _InjectedNoise(z) as noise:
                self._scaled[i] = scheduler.scale_model_input(x, timestep).flatten()
                stepped = scheduler.step(eps, timestep, x, **arguments, return_dict=False)[0]
            self._stepped[i] = stepped.flatten()
            self.draws_noise.append(noise.num_draws > 0)

    def analyse(self) -> Sequence[torch.Tensor]:
        """The columns after the timestep, each of shape (num_forwards,).

        Raises:
            NotLinearError: They do not account for the outputs.
        """
        forwards = torch.arange(self._num_forwards)
        scale = self._scaled[forwards, 2 * forwards]
        a = self._stepped[forwards, 2 * forwards]
        b = self._stepped[forwards, 2 * forwards + 1]
        d = self._stepped[:, 2 * self._num_forwards]
        e, f = torch.zeros_like(a), torch.zeros_like(a)
        e[:-1] = self._stepped[forwards[1:], 2 * forwards[:-1]]
        f[:-1] = self._stepped[forwards[1:], 2 * forwards[:-1] + 1]
        _check(self._scaled, scale[:, None] * self._x)
        carry = torch.zeros_like(self._x)
        carry[1:] = (e[:, None] * self._x + f[:, None] * self._eps)[:-1]
        _check(
            self._stepped, a[:, None] * self._x, b[:, None] * self._eps, d[:, None] * self._z, carry
        )
        return scale, a, b, d, e, f


def _check(outputs: torch.Tensor, *shares: torch.Tensor) -> None:
    if not torch.isfinite(outputs).all():
        raise ValueError("the sampler's coefficients are not finite")
    allowed = _TOLERANCE * (sum(share.abs() for share in shares) + _TOLERANCE)
    if ((outputs - sum(shares)).abs() > allowed).any():
        raise NotLinearError


class _InjectedNoise(TorchFunctionMode):
    """Answers `torch.randn` in this thread with a given tensor.

    Raises:
        NotLinearError: A second draw, or one of another shape.
    """

    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__()
        self._noise = noise
        self.num_draws = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        self.num_draws += 1
        if self.num_draws > 1 or tuple(args[0]) != tuple(self._noise.shape):
            raise NotLinearError
        return self._noise
