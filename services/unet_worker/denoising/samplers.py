"""Samplers by name: each is a diffusers scheduler built from the model folder's configuration."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import diffusers
import torch

from services.unet_worker.denoising.coefficients import (
    CoefficientTable,
    NotLinearError,
    read_table,
    rehearse,
)
from shared.errors import InvalidRequestError

DEFAULT_SAMPLER = "default"

_PLAIN_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_UNCLIPPED = {"clip_sample": False, "thresholding": False}
_DPMPP_2M = {
    **_PLAIN_SIGMAS,
    "use_lu_lambdas": False,
    "thresholding": False,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
}
SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", _UNCLIPPED),
    "euler": ("EulerDiscreteScheduler", _PLAIN_SIGMAS),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", _DPMPP_2M),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {**_DPMPP_2M, "use_karras_sigmas": True}),
    "lcm": ("LCMScheduler", _UNCLIPPED),
}
"""Name: (diffusers class, what is set over the folder's configuration)."""

_SECONDS_TO_BUILD = {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
_NUM_TABLES = 256
_TRIAL_STEPS = 4


class Samplers:
    """The samplers of one model.

    Beside the names of `SAMPLERS` there are `DEFAULT_SAMPLER`, the folder's own scheduler as it
    is, and the class names of the other diffusers schedulers that are compatible with it.

    Args:
        folder_scheduler: The pipeline's scheduler; it is not changed.
        device: Of the fallback instances' tensors.
        max_steps: The service's cap on `num_inference_steps`.
    """

    def __init__(self, folder_scheduler: Any, *, device: torch.device, max_steps: int) -> None:
        self._device = device
        self._prototypes: dict[str, Any] = {}
        self.max_steps: dict[str, int] = {}
        for name, prototype in _build_prototypes(folder_scheduler).items():
            limit = _step_limit(prototype, max_steps)
            if limit > 0:
                self._prototypes[name] = prototype
                self.max_steps[name] = limit
        self._cached_table = lru_cache(maxsize=_NUM_TABLES)(self._read_table)

    @property
    def names(self) -> tuple[str, ...]:
        """What `sampler` may be in a request, the usual ones first."""
        return tuple(self._prototypes)

    def table(self, name: str, num_inference_steps: int) -> CoefficientTable:
        """The sampler's numbers at these steps, from a cache after the first time.

        Raises:
            InvalidRequestError: No such sampler, or it can't do that many steps.
        """
        if name not in self._prototypes:
            raise InvalidRequestError(
                f"unknown sampler {name!r}.", field="sampler", allowed=", ".join(self.names)
            )
        limit = self.max_steps[name]
        if not 1 <= num_inference_steps <= limit:
            raise InvalidRequestError(
                f"num_inference_steps={num_inference_steps} is out of range for sampler {name!r}.",
                field="num_inference_steps",
                allowed=f"1 to {limit}",
            )
        return self._cached_table(name, num_inference_steps)

    def instance(self, name: str, num_inference_steps: int) -> Any:
        """A scheduler of its own for one request, timesteps set."""
        return _with_timesteps(self._prototypes[name], num_inference_steps, self._device)

    def _read_table(self, name: str, num_inference_steps: int) -> CoefficientTable:
        def scheduler() -> Any:
            return _with_timesteps(self._prototypes[name], num_inference_steps, "cpu")

        try:
            try:
                return read_table(scheduler())
            except (NotLinearError, RuntimeError):  # RuntimeError: float64 is not for everyone
                return rehearse(scheduler())
        except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:
            raise InvalidRequestError(
                f"sampler {name!r} can't do {num_inference_steps} steps with this model.",
                field="num_inference_steps",
                allowed=f"other numbers up to {self.max_steps[name]}",
            ) from error


def _build_prototypes(folder_scheduler: Any) -> dict[str, Any]:
    config = folder_scheduler.config
    prototypes: dict[str, Any] = {}
    for name, (class_name, overrides) in SAMPLERS.items():
        scheduler_class = getattr(diffusers, class_name)
        prototypes[name] = scheduler_class.from_config(config, **overrides)
    prototypes[DEFAULT_SAMPLER] = type(folder_scheduler).from_config(config)
    left_out = {class_name for class_name, _ in SAMPLERS.values()} | _SECONDS_TO_BUILD
    others = {one.__name__: one for one in folder_scheduler.compatibles}
    for class_name in sorted(others.keys() - left_out):
        scheduler_class = others[class_name]
        if "beta_schedule" not in inspect.signature(scheduler_class).parameters:
            continue  # another noise schedule than the model's
        try:
            prototypes[class_name] = scheduler_class.from_config(config)
        except ImportError:
            continue  # it needs a package that is not installed
    own_name = type(folder_scheduler).__name__
    if own_name not in left_out:
        prototypes[own_name] = prototypes[DEFAULT_SAMPLER]
    return prototypes


def _with_timesteps(prototype: Any, num_inference_steps: int, device: torch.device | str) -> Any:
    scheduler = copy.deepcopy(prototype)
    scheduler.set_timesteps(num_inference_steps, device=device)
    return scheduler


def _step_limit(prototype: Any, max_steps: int) -> int:
    """The most steps up to `max_steps` that `set_timesteps` accepts, 0 if it never does."""

    def can_do(num_inference_steps: int) -> bool:
        try:
            timesteps = _with_timesteps(prototype, num_inference_steps, "cpu").timesteps
        except (ValueError, ArithmeticError, LookupError, RuntimeError):
            return False
        return bool(timesteps.max() < prototype.config.num_train_timesteps)

    if not can_do(min(_TRIAL_STEPS, max_steps)):
        return 0
    low, high = min(_TRIAL_STEPS, max_steps), max_steps + 1
    while high - low > 1:
        middle = max_steps if high > max_steps else (low + high) // 2
        low, high = (middle, high) if can_do(middle) else (low, middle)
    return low
