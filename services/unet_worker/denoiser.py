"""Denoises many requests at once: one UNet forward over rows of any step, sampler, scale and seed.

The life of a request here: `admit` encodes its prompt and gives it a row of resident latents;
every `run` that names it with the step it holds moves it one forward on; after the last one its
latents are handed out and the row is free.

A row's result does not depend on its neighbours: no operation mixes rows. It can differ in the last
bits with the number of rows, because matrix kernels differ by shape; over whole trajectories that
stays far below what an 8-bit image shows.

All methods belong on one thread, the compute thread, except `draw_ahead`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from services.unet_worker import measure
from services.unet_worker.admission import batch_key, check_parameters, is_guided, make_conditions
from services.unet_worker.latents import BatchKey, LatentStore, NoiseSource, Resident, ResumeState
from services.unet_worker.model import DiffusionModel
from services.unet_worker.own_scheduler import OwnScheduler
from services.unet_worker.samplers import Samplers
from services.unet_worker.slot import RowOutcome, Slot, SlotRequest
from services.unet_worker.text_encoder import TextEncoder
from shared.errors import NumericalError, SynerDiffError
from shared.guidance_skip import SKIP_LEVELS, SkipParameters
from shared.messages import HeldRequest, ImageParameters, RowFailure, RowReport, SlotRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A request is held from now on.

    num_forwards: UNet forwards it takes. warnings: in words for the client. num_skipped: steps
    whose guidance was skipped where it was before.
    """

    num_forwards: int
    batch_key: BatchKey
    is_guided: bool
    warnings: tuple[str, ...]
    num_skipped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FinishedLatents:
    """A request is denoised and no longer held.

    latents: shape (1, C, h, w), float32, contiguous, on the model's device, the caller's own.
    """

    request_id: str
    attempt: str
    latents: torch.Tensor
    skipped_steps: tuple[int, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlotResult:
    """What became of a slot.

    rows: one report per row asked for, in order. num_unet_rows: rows of the forward.
    """

    rows: tuple[RowReport, ...]
    finished: tuple[FinishedLatents, ...] = ()
    failures: tuple[RowFailure, ...] = ()
    num_unet_rows: int = 0


class Denoiser:
    """The numerics of a UNet worker.

    Args:
        model: Loaded by `load_model`.
        max_requests: Held at once.
        max_side: Pixels of a picture's longer side.
        max_steps: Cap on `num_inference_steps`.
        skip_levels: What a request's `guidance_skip` may be.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        max_requests: int = 64,
        max_side: int = 1024,
        max_steps: int = 150,
        skip_levels: Mapping[str, SkipParameters | None] = SKIP_LEVELS,
    ) -> None:
        self._model = model
        self._max_side = max_side
        self._skip_levels = skip_levels
        self.samplers = Samplers(model.pipeline.scheduler, device=model.device, max_steps=max_steps)
        self.text_encoder = TextEncoder(model.pipeline, device=model.device)
        self._store = LatentStore(
            model,
            max_requests=max_requests,
            max_forwards=2 * max_steps + 16,  # Heun's second order, PNDM's warm-up
        )

    def admit(self, request_id: str, attempt: str, parameters: ImageParameters) -> Admission:
        """Hold a request from its first step on.

        The same attempt again changes nothing; another attempt replaces the one held.

        Raises:
            InvalidRequestError: It can't be served as it is.
            OverloadedError: No room.
        """
        resident = self._store.get(request_id, attempt)
        if resident is None:
            resident = self._add(request_id, attempt, parameters)
        return Admission(
            num_forwards=resident.table.num_forwards,
            batch_key=resident.pool.key,
            is_guided=resident.is_guided,
            warnings=resident.warnings,
            num_skipped=len(resident.skipped_steps),
        )

    def release(self, request_id: str, attempt: str | None = None) -> bool:
        """Forget a request, unless it is held for another attempt; returns whether it did."""
        return self._store.release(request_id, attempt)

    def held(self) -> tuple[HeldRequest, ...]:
        """Every request held, oldest first."""
        return tuple(
            HeldRequest(
                request_id=resident.request_id,
                attempt=resident.attempt,
                step_index=resident.step_index,
                num_forwards=resident.table.num_forwards,
                is_guided=resident.is_guided,
                num_skipped=len(resident.skipped_steps),
                last_full=max(resident.guidance.full_steps, default=-1),
                warnings=resident.warnings,
            )
            for resident in self._store.residents
        )

    def pixels_of(self, rows: Sequence[SlotRow]) -> int:
        """The area of the largest picture among these, 0 if none is held."""
        held = [self._store.get(row.request_id, row.attempt) for row in rows]
        sizes = [one.parameters.height * one.parameters.width for one in held if one is not None]
        return max(sizes, default=0)

    @property
    def draws_noise(self) -> bool:
        """Whether a request that is held will need noise."""
        return any(resident.noise.is_wanted for resident in self._store.residents)

    def draw_ahead(self, num_tensors: int = 2) -> None:
        """Draw the noise of coming steps; safe beside the compute thread."""
        for resident in self._store.residents:
            resident.noise.draw_ahead(num_tensors)

    @torch.inference_mode()
    def run(self, rows: Sequence[SlotRow]) -> SlotResult:
        """One forward of every row that is still right.

        A row runs if its request is held for its attempt at its step, and shares the batch key of
        the first that does; the others are reported as not run. A row asked to skip that may not
        runs in full. A request whose latents are no longer finite fails alone.

        Raises:
            RuntimeError, MemoryError: No request has gone on; fewer rows may fit the memory.
        """
        chosen = self._choose(rows)
        if not chosen:
            return SlotResult(rows=tuple(self._report(row, None) for row in rows))
        slot = Slot(list(chosen.values()))
        with self._model.forward.holding_threads():
            outcomes, update = slot.denoise(self._model)
        try:
            slot.pool.apply(update)
        except (RuntimeError, MemoryError) as error:
            # Nobody knows which rows have gone on, so none may try again.
            outcomes = [
                replace(one, error=f"the step could not be kept: {error}") for one in outcomes
            ]
        finished: list[FinishedLatents] = []
        failures: list[RowFailure] = []
        for outcome in outcomes:
            resident = outcome.resident
            resident.advance(
                is_skipped=outcome.is_skipped,
                skip_error=outcome.skip_error,
                scheduler=outcome.scheduler,
            )
            if outcome.error is not None or not outcome.is_finite:
                failures.append(_failure(outcome))
                self._store.release(resident.request_id)
            elif resident.is_finished:
                finished.append(_finished(outcome))
                self._store.release(resident.request_id)
        ran = {outcome.resident.request_id: outcome for outcome in outcomes}
        reports = [
            self._report(row, ran[row.request_id] if place in chosen else None)
            for place, row in enumerate(rows)
        ]
        return SlotResult(
            rows=tuple(reports),
            finished=tuple(finished),
            failures=tuple(failures),
            num_unet_rows=slot.num_unet_rows,
        )

    @torch.inference_mode()
    def export_state(self, request_id: str, attempt: str) -> ResumeState | None:
        """What another worker needs to go on with a request; the request stays held.

        None if it must start again there: it is not held, or its sampler has no linear table, so
        that its history is its scheduler's own.
        """
        resident = self._store.get(request_id, attempt)
        if resident is None or resident.scheduler is not None:
            return None
        return resident.export_state()

    def import_state(self, state: ResumeState) -> Admission:
        """Hold a request from the step on at which it was exported; it replaces any attempt held.

        Raises:
            InvalidRequestError: Not a request for this model.
            ProtocolError: The state does not fit its request.
            OverloadedError: No room.
        """
        resident = self._add(state.request_id, state.attempt, state.parameters)
        try:
            resident.restore(state)
        except BaseException:
            self._store.release(state.request_id)
            raise
        return self.admit(state.request_id, state.attempt, state.parameters)

    def warm_up(self, sizes: Sequence[tuple[int, int]], row_counts: Sequence[int]) -> None:
        """Run the UNet once at every (height, width) in pixels with every number of rows."""
        measure.warm_up(self._model, sizes, row_counts)

    def measure(
        self,
        row_counts: Sequence[int],
        *,
        size: tuple[int, int] | None = None,
        num_repeats: int = 5,
    ) -> dict[int, float]:
        """Median milliseconds of a UNet forward by its rows, at `size` or the model's default.

        row_counts: ascending; none is measured behind two in a row that gain nothing.
        """
        return measure.measure(self._model, row_counts, size=size, num_repeats=num_repeats)

    def measure_for(self, window_s: float, *, rows: int, size: tuple[int, int]) -> float:
        """Median milliseconds of a forward, one after another for so long, at `size` in pixels."""
        return measure.measure_for(self._model, window_s, rows=rows, size=size)

    def _add(self, request_id: str, attempt: str, parameters: ImageParameters) -> Resident:
        model, facts = self._model, self._model.facts
        check_parameters(parameters, facts, max_side=self._max_side, skip_levels=self._skip_levels)
        table = self.samplers.table(parameters.sampler, parameters.num_inference_steps)
        conditions, warnings = make_conditions(parameters, model, self.text_encoder)
        key = batch_key(parameters, facts)
        guided = is_guided(parameters, facts)
        may_skip = guided and table.num_forwards == parameters.num_inference_steps
        noise = NoiseSource(
            parameters.seed,
            (1, facts.latent_channels, key.latent_height, key.latent_width),
            sum(table.draws_noise),
        )
        scheduler = None
        if not table.is_linear:
            instance = self.samplers.instance(parameters.sampler, parameters.num_inference_steps)
            scheduler = OwnScheduler(instance, noise.generator)
        resident = Resident(
            request_id=request_id,
            attempt=attempt,
            parameters=parameters,
            warnings=warnings,
            table=table,
            is_guided=guided,
            skip_parameters=self._skip_levels[parameters.guidance_skip] if may_skip else None,
            noise=noise,
            scheduler=scheduler,
        )
        self._store.add(resident, key, conditions)
        return resident

    def _choose(self, rows: Sequence[SlotRow]) -> dict[int, SlotRequest]:
        """What runs, by its place in `rows`."""
        chosen: dict[int, SlotRequest] = {}
        pool, seen = None, set()
        for place, row in enumerate(rows):
            resident = self._store.get(row.request_id, row.attempt)
            if resident is None or resident.step_index != row.step_index:
                continue
            pool = pool or resident.pool
            if resident.pool is pool and row.request_id not in seen:
                seen.add(row.request_id)
                is_skipped = row.skip and resident.can_skip
                chosen[place] = SlotRequest(resident=resident, is_skipped=is_skipped)
        return chosen

    def _report(self, row: SlotRow, outcome: RowOutcome | None) -> RowReport:
        held = self._store.get(row.request_id, row.attempt)
        next_step_index = held.step_index if held is not None else -1
        if outcome is None:
            return RowReport(
                request_id=row.request_id,
                attempt=row.attempt,
                has_run=False,
                next_step_index=next_step_index,
            )
        return RowReport(
            request_id=row.request_id,
            attempt=row.attempt,
            has_run=True,
            next_step_index=next_step_index,
            was_skipped=outcome.is_skipped,
            can_skip=held is not None and held.can_skip,
            skip_steps=held.skip_steps if held is not None else 0,
            skip_error=outcome.skip_error or 0.0,
        )


def _finished(outcome: RowOutcome) -> FinishedLatents:
    resident = outcome.resident
    return FinishedLatents(
        request_id=resident.request_id,
        attempt=resident.attempt,
        latents=outcome.latents,
        skipped_steps=tuple(resident.skipped_steps),
        warnings=resident.warnings,
    )


def _failure(outcome: RowOutcome) -> RowFailure:
    resident = outcome.resident
    error = NumericalError if outcome.error is None else SynerDiffError
    return RowFailure(
        request_id=resident.request_id,
        attempt=resident.attempt,
        code=error.code,
        reason=outcome.error or f"the latents are not finite after step {outcome.step_index}",
    )
