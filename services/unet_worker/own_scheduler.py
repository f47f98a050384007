"""A request's own diffusers scheduler, where its sampler has no linear table."""

from __future__ import annotations

import copy
from typing import Any

import torch

from services.unet_worker.coefficients import step_arguments


class OwnScheduler:
    """A scheduler that steps of a request change, with the generator that it may draw noise from.

    A step is made by a copy, which takes the original's place when the slot has succeeded: a step
    that is tried again must not find what the first try has left.

    Args:
        scheduler: Timesteps set.
        generator: The request's own.
    """

    def __init__(self, scheduler: Any, generator: torch.Generator) -> None:
        self._scheduler = scheduler
        self._generator = generator

    def copy(self) -> OwnScheduler:
        """One that steps on without changing this one."""
        scheduler = copy.copy(self._scheduler)
        # Schedulers replace the tensors that they remember, and change the lists of them.
        vars(scheduler).update(
            {name: list(value) for name, value in vars(scheduler).items() if type(value) is list}
        )
        generator = torch.Generator()
        generator.set_state(self._generator.get_state())
        return OwnScheduler(scheduler, generator)

    def scale(self, latents: torch.Tensor, step_index: int) -> torch.Tensor:
        """The UNet's input."""
        scheduler = self._scheduler
        scaled: torch.Tensor = scheduler.scale_model_input(latents, scheduler.timesteps[step_index])
        return scaled

    def step(
        self, noise_pred: torch.Tensor, step_index: int, latents: torch.Tensor
    ) -> torch.Tensor:
        """The latents after a step, all of shape (1, C, h, w)."""
        scheduler = self._scheduler
        stepped: torch.Tensor = scheduler.step(
            noise_pred,
            scheduler.timesteps[step_index],
            latents,
            **step_arguments(scheduler, self._generator),
            return_dict=False,
        )[0]
        return stepped
