"""Foretells what a skip level does to recorded requests, without a single forward.

The rule is the product's (`guidance.can_skip`, `extrapolation_weights`): it is replayed over the
recorded directions. Every estimate is a sum of directions, so all that is needed of them are their
inner products. An error's effect on the final latents is taken to be the error times the gain of
its step, and errors of one request add up as vectors: a first-order approximation, good to order
candidates by, not to claim anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.trajectories import Trajectories
from services.unet_worker.denoising.guidance import GuidanceRecord, can_skip, extrapolation_weights
from shared.guidance_skip import SkipParameters

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """What is left of trajectories."""

    products: Floats
    """(cases, steps, steps): mean products of directions."""
    guided: Floats
    """(cases, steps): root mean square of the guided predictions."""
    scales: Floats
    """(cases,): guidance scale less one."""
    gains: Floats
    """(steps,)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """Of each case: the share of rows saved, and the root mean square error of the latents."""

    rows_saved: Floats
    errors: Floats


def make_replay(trajectories: Trajectories, gains: Mapping[int, float]) -> Replay:
    """Return what `replay` needs; gains between the measured steps are interpolated."""
    directions = trajectories.directions.flatten(2).double().transpose(0, 1)
    scales = [case.guidance_scale - 1 for case in trajectories.cases]
    guided = trajectories.text + trajectories.text.new_tensor(scales).view(1, -1, 1, 1, 1) * (
        trajectories.directions
    )
    steps = sorted(gains)
    return Replay(
        products=(directions @ directions.transpose(1, 2) / directions.shape[2]).numpy(),
        guided=guided.flatten(2).square().mean(dim=2).sqrt().T.double().numpy(),
        scales=np.array(scales),
        gains=np.interp(np.arange(trajectories.num_steps), steps, [gains[step] for step in steps]),
    )


def join(replays: Sequence[Replay]) -> Replay:
    """Return one replay of all their cases; gains are averaged."""
    return Replay(
        products=np.concatenate([part.products for part in replays]),
        guided=np.concatenate([part.guided for part in replays]),
        scales=np.concatenate([part.scales for part in replays]),
        gains=np.mean([part.gains for part in replays], axis=0),
    )


def replay(recorded: Replay, parameters: SkipParameters) -> Outcome:
    """Return what becomes of each case if everything is skipped that the level allows."""
    outcomes = [_replay_case(recorded, case, parameters) for case in range(len(recorded.scales))]
    rows_saved, errors = np.array(outcomes).T
    return Outcome(rows_saved=rows_saved, errors=errors)


def _replay_case(recorded: Replay, case: int, parameters: SkipParameters) -> tuple[float, float]:
    products, scale = recorded.products[case], recorded.scales[case]
    num_steps = len(recorded.gains)
    record = GuidanceRecord()
    effect = np.zeros(num_steps)
    num_skipped = 0
    for step in range(num_steps):
        wrong = _estimate(parameters, record, step, num_steps)
        wrong[step] -= 1.0
        if can_skip(parameters, record, step, num_steps):
            effect += recorded.gains[step] * scale * wrong
            num_skipped += 1
        else:
            error = np.sqrt(max(wrong @ products @ wrong, 0.0))
            record = record.after_full_step(step, scale * error / recorded.guided[case, step])
    total = np.sqrt(max(effect @ products @ effect, 0.0))
    return num_skipped / (2 * num_steps), float(total)


def _estimate(
    parameters: SkipParameters, record: GuidanceRecord, step: int, num_steps: int
) -> Floats:
    """Return the extrapolated direction as a sum of directions."""
    shares = np.zeros(num_steps)
    if record.full_steps:
        older, newest = record.full_steps[0], record.full_steps[-1]
        weights = extrapolation_weights(parameters, record, step)
        shares[newest] += weights[0]
        shares[older] += weights[1]
    return shares
