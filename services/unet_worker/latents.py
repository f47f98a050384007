"""What a UNet worker remembers of its requests between slots; all of it changes only here.

The tensors lie in pools, one per batch key, with a row per request, so that a slot gathers its rows
by index. The rest (step, noise, full steps) is a small host-side object per request.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from dataclasses import dataclass, field

import torch

from services.unet_worker.coefficients import COLUMNS, CoefficientTable
from services.unet_worker.guidance import (
    GuidanceRecord,
    can_skip,
    num_skippable,
)
from services.unet_worker.model import DiffusionModel
from services.unet_worker.own_scheduler import OwnScheduler
from shared.errors import OverloadedError, ProtocolError
from shared.guidance_skip import SkipParameters
from shared.messages import ImageParameters

_MIN_POOL_ROWS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchKey:
    """What requests must share to share a forward."""

    latent_height: int
    latent_width: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditions:
    """What a request's forwards are conditioned on.

    negative_prompt_embeds, prompt_embeds: (tokens, width). timestep_cond: (channels,), of a UNet
    that takes the guidance scale as an input.
    """

    negative_prompt_embeds: torch.Tensor
    prompt_embeds: torch.Tensor
    timestep_cond: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResumeState:
    """All that another worker with the same model needs to go on with a request.

    latents, carry: shape (1, C, h, w), float32, CPU. directions: the guidance of the last full
    steps, oldest first, shape (0 to 2, C, h, w). num_draws: noise tensors drawn after the initial
    one; the seed repeats them.
    """

    request_id: str
    attempt: str
    parameters: ImageParameters
    step_index: int
    latents: torch.Tensor
    carry: torch.Tensor
    directions: torch.Tensor
    guidance: GuidanceRecord
    num_draws: int
    skipped_steps: tuple[int, ...]


class NoiseSource:
    """A request's noise in the order in which diffusers draws it: float32 on the CPU.

    The first tensor is the initial latents, the others follow step by step. `draw_ahead` may be
    called from another thread.

    Args:
        seed: Of the request's own generator.
        shape: (1, C, h, w).
        num_draws: How many tensors will be taken after the initial one.
    """

    def __init__(self, seed: int, shape: tuple[int, int, int, int], num_draws: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._shape = shape
        self._drawn: deque[torch.Tensor] = deque()
        self._num_undrawn = num_draws
        self._lock = threading.Lock()
        self.num_taken = 0
        self.initial = self._draw()

    @property
    def is_wanted(self) -> bool:
        """Whether tensors are left to draw."""
        return self._num_undrawn > 0

    def peek(self) -> torch.Tensor:
        """The next tensor of noise, drawn now unless it was drawn ahead; `drop` goes on."""
        with self._lock:
            if not self._drawn:
                self._draw_one()
            return self._drawn[0]

    def drop(self) -> None:
        """Be done with the tensor that `peek` gives."""
        self.peek()
        with self._lock:
            self._drawn.popleft()
            self.num_taken += 1

    def draw_ahead(self, num_tensors: int) -> None:
        """Have up to `num_tensors` ready."""
        with self._lock:
            while len(self._drawn) < num_tensors and self._num_undrawn > 0:
                self._draw_one()

    def _draw_one(self) -> None:
        self._drawn.append(self._draw())
        self._num_undrawn -= 1

    def _draw(self) -> torch.Tensor:
        return torch.randn(self._shape, generator=self.generator)


@dataclass(slots=True, kw_only=True, eq=False)
class Resident:
    """One request between its slots.

    row: its place in the pool. scheduler: its own where its sampler has no linear table. newest:
    which of the two direction rows is the last full step's.
    """

    request_id: str
    attempt: str
    parameters: ImageParameters
    warnings: tuple[str, ...]
    table: CoefficientTable
    is_guided: bool
    skip_parameters: SkipParameters | None
    noise: NoiseSource
    scheduler: OwnScheduler | None = None
    pool: LatentPool = field(init=False)
    row: int = -1
    step_index: int = 0
    newest: int = 0
    guidance: GuidanceRecord = field(default_factory=GuidanceRecord)
    skipped_steps: list[int] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether every forward is done."""
        return self.step_index >= self.table.num_forwards

    @property
    def is_at_last_step(self) -> bool:
        """Whether one forward is left."""
        return self.step_index == self.table.num_forwards - 1

    @property
    def can_skip(self) -> bool:
        """Whether the next step may do without its negative row."""
        num_steps = self.table.num_forwards
        return not self.is_finished and can_skip(
            self.skip_parameters, self.guidance, self.step_index, num_steps
        )

    @property
    def skip_steps(self) -> int:
        """How many steps in a row, from the next one on, may do without their negative row."""
        if not self.can_skip or self.skip_parameters is None:
            return 0
        num_steps = self.table.num_forwards
        allowed = num_skippable(self.skip_parameters, self.guidance, num_steps)
        since_full = self.step_index - self.guidance.full_steps[-1]
        return min(allowed - since_full + 1, num_steps - self.step_index)

    def advance(
        self, *, is_skipped: bool, skip_error: float | None, scheduler: OwnScheduler | None
    ) -> None:
        """Count a forward; `skip_error` is None where no direction was stored."""
        self.scheduler = scheduler
        if is_skipped:
            self.skipped_steps.append(self.step_index)
        elif skip_error is not None:
            self.guidance = self.guidance.after_full_step(self.step_index, skip_error)
            self.newest = 1 - self.newest
        if self.table.draws_noise[self.step_index]:
            self.noise.drop()
        self.step_index += 1

    @torch.inference_mode()
    def export_state(self) -> ResumeState:
        """All that is needed to go on elsewhere, copied."""
        pool, row = self.pool, self.row
        sides = [1 - self.newest, self.newest][2 - len(self.guidance.full_steps) :]
        return ResumeState(
            request_id=self.request_id,
            attempt=self.attempt,
            parameters=self.parameters,
            step_index=self.step_index,
            latents=pool.latents[row : row + 1].to("cpu", copy=True),
            carry=pool.carry[row : row + 1].to("cpu", copy=True),
            directions=pool.directions[row, sides].to("cpu", copy=True),
            guidance=self.guidance,
            num_draws=self.noise.num_taken,
            skipped_steps=tuple(self.skipped_steps),
        )

    @torch.inference_mode()
    def restore(self, state: ResumeState) -> None:
        """Go to where `state` was exported.

        Raises:
            ProtocolError: The state is of another shape, or beyond the last step.
        """
        pool, row = self.pool, self.row
        num_directions = len(state.guidance.full_steps)
        fits = (
            state.latents.shape == state.carry.shape == pool.latents[row : row + 1].shape
            and state.directions.shape == pool.directions[row, :num_directions].shape
            and 0 <= state.step_index < self.table.num_forwards
            and state.num_draws == sum(self.table.draws_noise[: state.step_index])
        )
        if not fits:
            raise ProtocolError(f"the state of {state.request_id} does not fit its request")
        pool.latents[row] = state.latents[0].to(pool.latents)
        pool.carry[row] = state.carry[0].to(pool.carry)
        pool.directions[row, :num_directions] = state.directions.to(pool.directions)
        self.newest = max(num_directions - 1, 0)
        self.step_index = state.step_index
        self.guidance = state.guidance
        self.skipped_steps = list(state.skipped_steps)
        for _ in range(state.num_draws):
            self.noise.drop()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PoolUpdate:
    """What a forward has made of some rows of a pool.

    latents, carry: of `rows`. directions: the guidance of those that ran in full and keep it,
    `tracked_rows`, for their older `sides`.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    carry: torch.Tensor
    tracked_rows: torch.Tensor
    sides: torch.Tensor
    directions: torch.Tensor


class LatentPool:
    """The resident tensors of one batch key, a row per request.

    latents, carry: (rows, C, h, w) float32. directions: (rows, 2, C, h, w) float32, the guidance of
    the last two full steps. prompt_embeds: (rows, 2, tokens, width) in the model's dtype, negative
    first. schedule: (rows, max_forwards, columns) float32, each request's coefficient table.
    guidance_scale: (rows,) float32. timestep_cond: (rows, channels) in the model's dtype.

    The pool doubles when it is full and halves when three quarters are empty, so that its memory
    stays within four times what its requests need.
    """

    def __init__(self, key: BatchKey, model: DiffusionModel, max_forwards: int) -> None:
        facts = model.facts
        latent_shape = (facts.latent_channels, key.latent_height, key.latent_width)
        self.key = key
        self.residents: list[Resident | None] = [None] * _MIN_POOL_ROWS

        def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros((_MIN_POOL_ROWS, *shape), dtype=dtype, device=model.device)

        self.latents = rows(*latent_shape)
        self.carry = rows(*latent_shape)
        self.directions = rows(2, *latent_shape)
        self.prompt_embeds = rows(2, key.num_tokens, facts.text_width, dtype=model.dtype)
        self.schedule = rows(max_forwards, len(COLUMNS))
        self.guidance_scale = rows()
        self.timestep_cond = rows(facts.timestep_cond_channels, dtype=model.dtype)

    @property
    def num_residents(self) -> int:
        """Rows in use."""
        return sum(resident is not None for resident in self.residents)

    def add(self, resident: Resident, conditions: Conditions) -> None:
        """Give `resident` a row."""
        if None not in self.residents:
            self._resize(2 * len(self.residents))
        row = self.residents.index(None)
        table = resident.table
        self.latents[row] = resident.noise.initial[0].to(self.latents) * table.init_noise_sigma
        self.carry[row] = 0.0
        self.directions[row] = 0.0
        self.prompt_embeds[row, 0] = conditions.negative_prompt_embeds
        self.prompt_embeds[row, 1] = conditions.prompt_embeds
        self.schedule[row, : table.num_forwards] = table.rows.to(self.schedule)
        self.guidance_scale[row] = resident.parameters.guidance_scale
        self.timestep_cond[row] = conditions.timestep_cond
        self.residents[row] = resident
        resident.row = row

    def remove(self, resident: Resident) -> None:
        """Free the row."""
        self.residents[resident.row] = None
        resident.row = -1
        num_rows = len(self.residents)
        if num_rows > _MIN_POOL_ROWS and 4 * self.num_residents <= num_rows:
            # Where there is no memory to copy to, the pool stays as large as it is.
            with contextlib.suppress(RuntimeError, MemoryError):
                self._resize(num_rows // 2)

    def apply(self, update: PoolUpdate) -> None:
        """Take over what a forward has made of its rows."""
        self.latents[update.rows] = update.latents
        self.carry[update.rows] = update.carry
        self.directions[update.tracked_rows, update.sides] = update.directions

    def _resize(self, num_rows: int) -> None:
        kept = [resident for resident in self.residents if resident is not None]
        old_rows = [resident.row for resident in kept]
        resized = {}
        for name, tensor in vars(self).items():
            if isinstance(tensor, torch.Tensor):
                resized[name] = tensor.new_zeros(num_rows, *tensor.shape[1:])
                resized[name][: len(kept)] = tensor[old_rows]
        vars(self).update(resized)
        self.residents = [*kept, *[None] * (num_rows - len(kept))]
        for row, resident in enumerate(kept):
            resident.row = row


class LatentStore:
    """The requests a worker holds.

    Args:
        model: Whose latents these are.
        max_requests: Held at once.
        max_forwards: Of any request.
    """

    def __init__(self, model: DiffusionModel, *, max_requests: int, max_forwards: int) -> None:
        self._model = model
        self._max_requests = max_requests
        self._max_forwards = max_forwards
        self._residents: dict[str, Resident] = {}
        self._pools: dict[BatchKey, LatentPool] = {}

    @property
    def residents(self) -> list[Resident]:
        """Every request held, oldest first."""
        return list(self._residents.values())

    def get(self, request_id: str, attempt: str) -> Resident | None:
        """The request, if it is held for that attempt."""
        resident = self._residents.get(request_id)
        return resident if resident is not None and resident.attempt == attempt else None

    @torch.inference_mode()
    def add(self, resident: Resident, key: BatchKey, conditions: Conditions) -> None:
        """Hold a request; another attempt of it is forgotten.

        Raises:
            OverloadedError: `max_requests` are held.
        """
        self.release(resident.request_id)
        if len(self._residents) >= self._max_requests:
            raise OverloadedError(
                f"the worker holds {self._max_requests} requests", retry_after_s=1.0
            )
        if key not in self._pools:
            self._pools = {k: pool for k, pool in self._pools.items() if pool.num_residents}
            self._pools[key] = LatentPool(key, self._model, self._max_forwards)
        resident.pool = self._pools[key]
        resident.pool.add(resident, conditions)
        self._residents[resident.request_id] = resident

    @torch.inference_mode()
    def release(self, request_id: str, attempt: str | None = None) -> bool:
        """Forget a request, unless it is held for another attempt; returns whether it did."""
        resident = self._residents.get(request_id)
        if resident is None or (attempt is not None and resident.attempt != attempt):
            return False
        del self._residents[request_id]
        resident.pool.remove(resident)
        return True
