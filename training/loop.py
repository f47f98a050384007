"""The training loop that every stage shares: resumable, pausable, averaged, in parallel.

Several processes train as in local SGD (Stich 2019): each takes its own steps on its own batches,
and every few steps all take the mean of their weights. On cores that others use, too, this loses
far less to waiting than gradients averaged at every step.
"""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

LOG_EVERY_STEPS = 50
SYNC_EVERY_STEPS = 8
SAVE_EVERY_S = 180.0
PAUSE_POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How long and how hard a module learns. A step is one batch in each process."""

    steps: int
    peak_rate: float
    weight_decay: float
    average_decay: float
    seed: int
    warmup_steps: int = 100
    clip_norm: float = 1.0


class Draws:
    """Random numbers of one step in one process: the same after a resume, whatever came before."""

    def __init__(self, *, seed: int, step: int) -> None:
        self.step = step
        self.rank, self.num_ranks = rank_of_process(), num_processes()
        self._seed = seed
        self.random = random.Random(f"{seed} {self.rank} {step}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))

    def indices(self, count: int, *, rows: int) -> list[int]:
        """Return this process's `rows` picture numbers below `count`: each once per epoch."""
        first = (self.step * self.num_ranks + self.rank) * rows
        return [self._shuffled(i // count, count)[i % count] for i in range(first, first + rows)]

    def _shuffled(self, epoch: int, count: int) -> list[int]:
        return random.Random(f"{self._seed} epoch {epoch}").sample(range(count), count)


def rank_of_process() -> int:
    """Return this process's number among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cosine_rate(step: int, settings: LoopSettings) -> float:
    """Return the learning rate of `step`: linear warm-up, then half a cosine to 1 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / settings.steps, 1.0)))
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.peak_rate * warmup * (0.01 + 0.99 * cosine)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that a reader finds the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)  # noqa: PTH105 - the atomic rename is the point


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return what `save_checkpoint` wrote, on the CPU; None where there is nothing."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def train(
    module: nn.Module,
    loss_of: Callable[[Draws], Tensor],
    settings: LoopSettings,
    checkpoint: Path,
    *,
    on_save: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Minimise `loss_of` until `settings.steps`, from `checkpoint` where there is one.

    Returns the exponential moving average of `module`. `on_save` is given that average and the
    step after every checkpoint. SIGUSR1 pauses the training, and resumes it.
    """
    average = copy.deepcopy(module).requires_grad_(requires_grad=False).eval()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.peak_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    step = 0
    state = load_checkpoint(checkpoint)
    if state is not None:
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    switch = _PauseSwitch()
    saved_at = logged_at = time.monotonic()
    losses: list[float] = []
    while step < settings.steps:
        switch.wait()
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, settings)
        loss = loss_of(Draws(seed=settings.seed, step=step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        if math.isfinite(norm):
            optimizer.step()
        step += 1
        if step % SYNC_EVERY_STEPS == 0 or step == settings.steps:
            _share_weights(parameters)
        _move_average(average, module, min(settings.average_decay, (1 + step) / (10 + step)))
        losses.append(loss.item())
        now = time.monotonic()
        if step % LOG_EVERY_STEPS == 0 and rank_of_process() == 0:
            pace = (now - logged_at) / len(losses)
            print(f"step {step} loss {fmean(losses):.4f} {pace:.2f} s/step", flush=True)
            losses, logged_at = [], now
        is_due = now - saved_at > SAVE_EVERY_S or step == settings.steps
        if is_due and rank_of_process() == 0:
            save_checkpoint(
                {
                    "module": module.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                },
                checkpoint,
            )
            if on_save is not None:
                on_save(average, step)
            saved_at = time.monotonic()
            logged_at += saved_at - now  # the pace is that of the steps
    return average


@torch.no_grad()
def _move_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move `average` towards `module`; quickly in the first steps."""
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


@torch.no_grad()
def _share_weights(parameters: list[nn.Parameter]) -> None:
    """Give all processes the mean of their weights."""
    if num_processes() == 1:
        return
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    flat /= num_processes()
    first = 0
    for parameter in parameters:
        last = first + parameter.numel()
        parameter.copy_(flat[first:last].view_as(parameter))
        first = last


class _PauseSwitch:
    """Lets others have the cores for a while: SIGUSR1 pauses, SIGUSR1 resumes."""

    def __init__(self) -> None:
        self._is_paused = False
        signal.signal(signal.SIGUSR1, self._toggle)

    def wait(self) -> None:
        while self._is_paused:
            time.sleep(PAUSE_POLL_S)

    def _toggle(self, _number: int, _frame: FrameType | None) -> None:
        self._is_paused = not self._is_paused
