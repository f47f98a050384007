"""The tensor work of a slot: a forward, guidance and update over rows of one pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.unet_worker.backends.protocol import Backend
from services.unet_worker.denoising.guidance import (
    extrapolate,
    extrapolation_weights,
    guidance_error,
    guide,
    guide_from_text,
)
from services.unet_worker.denoising.latents import LatentPool, PoolUpdate, Resident
from services.unet_worker.denoising.own_scheduler import OwnScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRequest:
    """A request's part in a slot."""

    resident: Resident

    is_skipped: bool
    """Whether its guidance is extrapolated."""

    @property
    def is_tracked(self) -> bool:
        """Whether its guidance directions are kept."""
        return self.resident.is_guided and self.resident.skip_parameters is not None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowOutcome:
    """What a forward made of a request."""

    resident: Resident

    step_index: int
    """The forward that was run."""

    is_skipped: bool
    """Whether its guidance was extrapolated."""

    latents: torch.Tensor
    """(1, C, h, w), float32, on the device: of a finished request its own, else a view."""

    scheduler: OwnScheduler | None
    """That of a sampler without a linear table, a step on."""

    is_finite: bool
    """Whether the latents are."""

    skip_error: float | None
    """`guidance_error` of the extrapolated direction at a full step whose directions are kept."""

    error: str | None
    """Why the update failed, None if it did not."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Uploads:
    """What a slot brings from the host."""

    indices: torch.Tensor
    """(3, requests): rows of the pool, steps, and the sides of the newest directions."""

    weights: torch.Tensor
    """(2, tracked requests, 1, 1, 1): of the directions, for `extrapolate`."""

    noisy: torch.Tensor
    """Places of the requests whose update adds noise."""

    noise: torch.Tensor | None
    """(noisy requests, C, h, w), None if there are none."""


class Slot:
    """Requests of one pool, sorted so that every kind of row is a slice.

    First the skipped ones, then those guided in full whose directions are kept, then the other
    guided ones, then the unguided ones.
    """

    def __init__(self, requests: Sequence[SlotRequest]) -> None:
        skipped = [request for request in requests if request.is_skipped]
        guided = [request for request in requests if request.resident.is_guided]
        full = [request for request in guided if not request.is_skipped]
        tracked = [request for request in full if request.is_tracked]
        untracked = [request for request in full if not request.is_tracked]
        unguided = [request for request in requests if not request.resident.is_guided]
        self._requests = [*skipped, *tracked, *untracked, *unguided]
        self.pool: LatentPool = requests[0].resident.pool
        self._num_skipped = len(skipped)
        self._num_tracked = len(skipped) + len(tracked)
        self._full = slice(len(skipped), len(skipped) + len(full))

    @property
    def num_unet_rows(self) -> int:
        """Return the rows of the forward."""
        return len(self._requests) + self._full.stop - self._full.start

    def denoise(self, backend: Backend) -> tuple[list[RowOutcome], PoolUpdate]:
        """Run the forward; return what it makes of each request, and of what their pool holds.

        Everything from the host goes to the device ahead of the forward, and the device is waited
        for once, at the end. Nothing is changed yet: where this raises, it may be tried again.
        """
        residents = [request.resident for request in self._requests]
        pool = self.pool
        uploads = self._upload(backend)
        rows, steps, newest = uploads.indices
        timestep, *columns = pool.schedule[rows, steps].unbind(1)
        input_scale, a, b, d, e, f = (column.view(-1, 1, 1, 1) for column in columns)
        guidance_scale = pool.guidance_scale[rows].view(-1, 1, 1, 1)

        latents = pool.latents[rows]
        scaled = latents * input_scale
        own = {
            i: resident.scheduler.copy()
            for i, resident in enumerate(residents)
            if resident.scheduler is not None
        }
        for i, scheduler in own.items():
            scaled[i : i + 1] = scheduler.scale(latents[i : i + 1], residents[i].step_index)
        noise_pred_uncond, noise_pred_text = self._predict(backend, rows, scaled, timestep)

        full, num_skipped, num_tracked = self._full, self._num_skipped, self._num_tracked
        direction = noise_pred_text[full] - noise_pred_uncond
        noise_pred = noise_pred_text.clone()
        noise_pred[full] = guide(noise_pred_uncond, direction, guidance_scale[full])
        skip_errors = latents.new_empty(0)
        tracked, measured = slice(num_skipped, num_tracked), direction[:0]
        if num_tracked > 0:
            rows_, newest_ = rows[:num_tracked], newest[:num_tracked]
            estimate = extrapolate(
                pool.directions[rows_, newest_],
                pool.directions[rows_, 1 - newest_],
                uploads.weights,
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
        if uploads.noise is not None:
            stepped.index_add_(0, uploads.noisy, d[uploads.noisy] * uploads.noise)
        errors: dict[int, str] = {}
        for i, scheduler in own.items():
            try:
                stepped[i : i + 1] = scheduler.step(
                    noise_pred[i : i + 1].clone(),  # it may keep them, but not the whole batch
                    residents[i].step_index,
                    latents[i : i + 1].clone(),
                )
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001  a foreign class; its row fails alone
                errors[i] = f"the sampler failed: {error!r}"

        is_finite = torch.isfinite(stepped).flatten(1).all(dim=1)
        numbers = backend.fetch(torch.cat([is_finite.float(), skip_errors]))
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
        backend: Backend,
        rows: torch.Tensor,
        scaled: torch.Tensor,
        timestep: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the predictions for the negative rows of the full ones and for all positive."""
        full = self._full
        num_full = full.stop - full.start
        noise_pred = backend.predict(
            torch.cat([scaled[full], scaled]),
            torch.cat([timestep[full], timestep]),
            {
                name: torch.cat([values[rows[full], 0], values[rows, 1]])
                for name, values in self.pool.conditions.items()
            },
        )
        return noise_pred[:num_full], noise_pred[num_full:]

    def _upload(self, backend: Backend) -> _Uploads:
        residents = [request.resident for request in self._requests]
        noisy = [
            i
            for i, resident in enumerate(residents)
            if resident.table.draws_noise[resident.step_index]
        ]
        indices = [[held.row, held.step_index, held.newest] for held in residents]
        noise = [residents[i].noise.peek() for i in noisy]
        return _Uploads(
            indices=backend.upload(torch.tensor(indices)).T,
            weights=backend.upload(self._extrapolation_weights()),
            noisy=backend.upload(torch.tensor(noisy, dtype=torch.int64)),
            noise=backend.upload(torch.cat(noise)) if noise else None,
        )

    def _extrapolation_weights(self) -> torch.Tensor:
        weights = []
        for request in self._requests[: self._num_tracked]:
            resident = request.resident
            assert resident.skip_parameters is not None
            weights.append(
                extrapolation_weights(
                    resident.skip_parameters, resident.guidance, resident.step_index
                )
            )
        return torch.tensor(weights).reshape(len(weights), 2).T[..., None, None, None]
