"""The tensor work of one slot: one UNet forward, guidance and update over rows of one pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.unet_worker.guidance import (
    extrapolate,
    extrapolation_weights,
    guidance_error,
    guide,
    guide_from_text,
)
from services.unet_worker.latents import LatentPool, PoolUpdate, Resident
from services.unet_worker.model import DiffusionModel
from services.unet_worker.own_scheduler import OwnScheduler


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

    step_index: the forward that was run. latents: (1, C, h, w) float32 on the device, of a finished
    request its own, else a view. scheduler: that of a sampler without a linear table, one step on.
    skip_error: `guidance_error` of the extrapolated direction, None where this was no full step
    with directions kept. error: why the update failed, None if it did not.
    """

    resident: Resident
    step_index: int
    is_skipped: bool
    latents: torch.Tensor
    scheduler: OwnScheduler | None
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
        self.pool: LatentPool = requests[0].resident.pool
        self._num_skipped = len(skipped)
        self._num_tracked = len(skipped) + len(tracked)
        self._full = slice(len(skipped), len(skipped) + len(full))

    @property
    def num_unet_rows(self) -> int:
        """Rows of the UNet forward."""
        return len(self._requests) + self._full.stop - self._full.start

    def denoise(self, model: DiffusionModel) -> tuple[list[RowOutcome], PoolUpdate]:
        """Run the forward; what it makes of each request, and of what their pool holds.

        Nothing is changed yet: where this raises, it may be tried again.
        """
        residents = [request.resident for request in self._requests]
        pool = self.pool
        rows, steps, newest = torch.tensor(
            [[one.row, one.step_index, one.newest] for one in residents]
        ).T.to(model.device)
        timestep, *columns = pool.schedule[rows, steps].unbind(1)
        input_scale, a, b, d, e, f = (column.view(-1, 1, 1, 1) for column in columns)
        guidance_scale = pool.guidance_scale[rows].view(-1, 1, 1, 1)

        latents = pool.latents[rows]
        scaled = latents * input_scale
        own = {
            i: one.scheduler.copy() for i, one in enumerate(residents) if one.scheduler is not None
        }
        for i, one in own.items():
            scaled[i : i + 1] = one.scale(latents[i : i + 1], residents[i].step_index)
        noise_pred_uncond, noise_pred_text = self._predict(model, rows, scaled, timestep)

        full, num_skipped, num_tracked = self._full, self._num_skipped, self._num_tracked
        direction = noise_pred_text[full] - noise_pred_uncond
        noise_pred = noise_pred_text.clone()
        noise_pred[full] = guide(noise_pred_uncond, direction, guidance_scale[full])
        skip_errors = torch.empty(0, device=model.device)
        tracked, measured = slice(num_skipped, num_tracked), direction[:0]
        if num_tracked > 0:
            rows_, newest_ = rows[:num_tracked], newest[:num_tracked]
            estimate = extrapolate(
                pool.directions[rows_, newest_],
                pool.directions[rows_, 1 - newest_],
                self._extrapolation_weights(model.device),
            )
            skipped = slice(0, num_skipped)
            noise_pred[skipped] = guide_from_text(
                noise_pred[skipped], estimate[skipped], guidance_scale[skipped]
            )
            measured = direction[: num_tracked - num_skipped]
            skip_errors = guidance_error(
                estimate[tracked], measured, noise_pred[tracked], guidance_scale[tracked]
            )

        stepped = a * latents + b * noise_pred + pool.carry[rows]
        noisy = [i for i, one in enumerate(residents) if one.table.draws_noise[one.step_index]]
        if noisy:
            noise = torch.cat([residents[i].noise.peek() for i in noisy]).to(model.device)
            stepped[noisy] += d[noisy] * noise
        errors: dict[int, str] = {}
        for i, one in own.items():
            try:
                stepped[i : i + 1] = one.step(
                    noise_pred[i : i + 1].clone(),  # it may keep them, but not the whole batch
                    residents[i].step_index,
                    latents[i : i + 1].clone(),
                )
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001  a foreign class; its row fails alone
                errors[i] = f"the sampler failed: {error!r}"

        is_finite = torch.isfinite(stepped).flatten(1).all(dim=1)
        numbers = torch.cat([is_finite.float(), skip_errors]).tolist()  # the slot's one wait
        errors_from = len(residents) - num_skipped
        outcomes = [
            RowOutcome(
                resident=request.resident,
                step_index=request.resident.step_index,
                is_skipped=request.is_skipped,
                latents=(
                    stepped[i : i + 1].clone()
                    if request.resident.is_at_last_step
                    else stepped[i : i + 1]
                ),
                scheduler=own.get(i),
                is_finite=bool(numbers[i]),
                skip_error=numbers[errors_from + i] if num_skipped <= i < num_tracked else None,
                error=errors.get(i),
            )
            for i, request in enumerate(self._requests)
        ]
        return outcomes, PoolUpdate(
            rows=rows,
            latents=stepped,
            carry=e * latents + f * noise_pred,
            tracked_rows=rows[tracked],
            sides=1 - newest[tracked],
            directions=measured,
        )

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
            self.pool.prompt_embeds[pool_rows, sides],
            self.pool.timestep_cond[pool_rows],
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
