"""The tensor work of one slot: one UNet forward, guidance and update over rows of one pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.unet_worker.denoising.coefficients import step_arguments
from services.unet_worker.denoising.guidance import (
    extrapolate,
    extrapolation_weights,
    guidance_error,
    guide,
    guide_from_text,
)
from services.unet_worker.denoising.latents import LatentPool, Resident
from services.unet_worker.families.loading import DiffusionModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRequest:
    """A request's part in a slot; `is_skipped`: its guidance is extrapolated."""

    resident: Resident
    is_skipped: bool

    @property
    def is_tracked(self) -> bool:
        """Whether its guidance directions are kept."""
        return self.resident.is_guided and self.resident.skip_parameters is not None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowOutcome:
    """What a forward made of one request.

    step_index: the forward that was run. latents: (1, C, h, w) float32 on the device, a view.
    skip_error: `guidance_error` of the extrapolated direction, None where this was no full step
    with directions kept. error: why the update failed, None if it did not.
    """

    resident: Resident
    step_index: int
    is_skipped: bool
    latents: torch.Tensor
    is_finite: bool
    skip_error: float | None
    error: str | None


class Slot:
    """Requests of one pool, sorted so that every kind of row is a slice.

    First the skipped ones, then those guided in full whose directions are kept, then the other
    guided ones, then the unguided ones.
    """

    def __init__(self, requests: Sequence[SlotRequest]) -> None:
        skipped = [one for one in requests if one.is_skipped]
        full = [one for one in requests if one.resident.is_guided and not one.is_skipped]
        tracked = [one for one in full if one.is_tracked]
        untracked = [one for one in full if not one.is_tracked]
        unguided = [one for one in requests if not one.resident.is_guided]
        self._requests = [*skipped, *tracked, *untracked, *unguided]
        self._pool: LatentPool = requests[0].resident.pool
        self._num_skipped = len(skipped)
        self._num_tracked = len(skipped) + len(tracked)
        self._full = slice(len(skipped), len(skipped) + len(full))

    @property
    def num_unet_rows(self) -> int:
        """Rows of the UNet forward."""
        return len(self._requests) + self._full.stop - self._full.start

    def denoise(self, model: DiffusionModel) -> list[RowOutcome]:
        """Run the forward and store what it makes of the latents.

        Requests go on only by `Resident.advance`: where this raises, it may be tried again.
        """
        residents = [request.resident for request in self._requests]
        pool = self._pool
        rows, steps, newest = torch.tensor(
            [[one.row, one.step_index, one.newest] for one in residents]
        ).T.to(model.device)
        timestep, *columns = pool.schedule[rows, steps].unbind(1)
        input_scale, a, b, d, e, f = (column.view(-1, 1, 1, 1) for column in columns)
        guidance_scale = pool.guidance_scale[rows].view(-1, 1, 1, 1)

        latents = pool.latents[rows]
        scaled = latents * input_scale
        for i, scheduler, own_timestep in self._own_schedulers():
            scaled[i : i + 1] = scheduler.scale_model_input(latents[i : i + 1], own_timestep)
        noise_pred_uncond, noise_pred_text = self._predict(model, rows, scaled, timestep)

        full, num_skipped, num_tracked = self._full, self._num_skipped, self._num_tracked
        direction = noise_pred_text[full] - noise_pred_uncond
        noise_pred = noise_pred_text.clone()
        noise_pred[full] = guide(noise_pred_uncond, direction, guidance_scale[full])
        skip_errors = torch.empty(0, device=model.device)
        if num_tracked > 0:
            rows_, newest_ = rows[:num_tracked], newest[:num_tracked]
            estimate = extrapolate(
                pool.directions[rows_, newest_],
                pool.directions[rows_, 1 - newest_],
                self._extrapolation_weights(model.device),
            )
            skipped, tracked = slice(0, num_skipped), slice(num_skipped, num_tracked)
            noise_pred[skipped] = guide_from_text(
                noise_pred[skipped], estimate[skipped], guidance_scale[skipped]
            )
            measured = direction[: num_tracked - num_skipped]
            skip_errors = guidance_error(
                estimate[tracked], measured, noise_pred[tracked], guidance_scale[tracked]
            )
            pool.store_directions(rows[tracked], 1 - newest[tracked], measured)

        stepped = a * latents + b * noise_pred + pool.carry[rows]
        noisy = [i for i, one in enumerate(residents) if one.table.draws_noise[one.step_index]]
        if noisy:
            noise = torch.cat([residents[i].noise.peek() for i in noisy]).to(model.device)
            stepped[noisy] += d[noisy] * noise
        errors: dict[int, str] = {}
        for i, scheduler, own_timestep in self._own_schedulers():
            try:
                stepped[i : i + 1] = scheduler.step(
                    noise_pred[i : i + 1].clone(),  # it may keep them, but not the whole batch
                    own_timestep,
                    latents[i : i + 1].clone(),
                    **step_arguments(scheduler, residents[i].noise.generator),
                    return_dict=False,
                )[0]
            except Exception as error:  # noqa: BLE001  a foreign class; its row fails alone
                errors[i] = f"the sampler failed: {error!r}"
        pool.store(rows, stepped, e * latents + f * noise_pred)

        is_finite = torch.isfinite(stepped).flatten(1).all(dim=1)
        numbers = torch.cat([is_finite.float(), skip_errors]).tolist()  # the slot's one wait
        errors_from = len(residents) - num_skipped
        return [
            RowOutcome(
                resident=request.resident,
                step_index=request.resident.step_index,
                is_skipped=request.is_skipped,
                latents=stepped[i : i + 1],
                is_finite=bool(numbers[i]),
                skip_error=numbers[errors_from + i] if num_skipped <= i < num_tracked else None,
                error=errors.get(i),
            )
            for i, request in enumerate(self._requests)
        ]

    def _predict(
        self,
        model: DiffusionModel,
        rows: torch.Tensor,
        scaled: torch.Tensor,
        timestep: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The UNet's output for the negative prompts of the full rows and for all positive ones."""
        full = self._full
        num_full = full.stop - full.start
        pool_rows = torch.cat([rows[full], rows])
        sides = torch.ones_like(pool_rows)
        sides[:num_full] = 0
        noise_pred = predict_noise(
            model,
            torch.cat([scaled[full], scaled]),
            torch.cat([timestep[full], timestep]),
            self._pool.prompt_embeds[pool_rows, sides],
            self._pool.timestep_cond[pool_rows],
        )
        return noise_pred[:num_full], noise_pred[num_full:]

    def _extrapolation_weights(self, device: torch.device) -> torch.Tensor:
        weights = []
        for request in self._requests[: self._num_tracked]:
            resident = request.resident
            assert resident.skip_parameters is not None
            weights.append(
                extrapolation_weights(
                    resident.skip_parameters, resident.guidance, resident.step_index
                )
            )
        return torch.tensor(weights, device=device).T.reshape(2, -1, 1, 1, 1)

    def _own_schedulers(self) -> list[tuple[int, Any, torch.Tensor]]:
        """(place, scheduler, timestep) of the requests whose sampler has no linear table."""
        return [
            (i, one.scheduler, one.scheduler.timesteps[one.step_index])
            for i, one in enumerate(request.resident for request in self._requests)
            if one.scheduler is not None
        ]


def predict_noise(
    model: DiffusionModel,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    prompt_embeds: torch.Tensor,
    timestep_cond: torch.Tensor,
) -> torch.Tensor:
    """One UNet forward in the model's dtype.

    Args:
        model: The model.
        sample: (rows, C, h, w), float32.
        timestep: (rows,), float32; Euler's are fractional.
        prompt_embeds: (rows, tokens, width).
        timestep_cond: (rows, channels); used if there are channels.

    Returns:
        (rows, C, h, w), float32.
    """
    prediction = model.forward(*unet_inputs(model, sample, timestep, prompt_embeds, timestep_cond))
    return prediction.float().contiguous()


def unet_inputs(
    model: DiffusionModel,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    prompt_embeds: torch.Tensor,
    timestep_cond: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The arguments of `predict_noise` as `DiffusionModel.forward` takes them."""
    sample = sample.to(model.dtype, memory_format=torch.channels_last)
    conditions = (timestep_cond,) if timestep_cond.shape[1] else ()
    return (sample, timestep, prompt_embeds, *conditions)
