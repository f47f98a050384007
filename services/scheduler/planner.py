"""The planner: how many decode chunks and how many skipped rows go with each of the next slots.

A `Problem` is a row of *stages*, the device's next periods in order; of each stage's `Option`s one
is chosen. A UNet slot is a stage whose options differ in the chunks beside it and the rows skipped;
the gap ahead of a slot is a stage whose options decode so many chunks alone, or none in no time.
Chunks are served in the order of the decodes, so a plan is a sequence of options and nothing else:

    minimise   sum over stages of  ms * (decodes unfinished at its start) + price,
               + for what is unfinished at the end, the time its last chunk still takes at best
    subject to sum over stages of ms <= budget_ms, and no more chunks than there are.

That is a resource-constrained shortest path. Each stage's time above its shortest option, its
*excess*, is counted in buckets, rounded up; the dynamic programme goes backwards over (stage,
chunks done, excess left) and keeps the least cost to go of each. Rounding up means that a plan
found never exceeds the budget; a stage's shortest option costs no excess at all, so where any
sequence keeps the budget, the one of all the shortest options does and a plan is found.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, inf

import numpy as np
from numpy.typing import NDArray

NUM_BUCKETS = 32
"""Of the slack between the shortest sequence and the budget."""

EPSILON = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to spend a stage: chunks decoded, rows skipped, how long it takes, its price.

    price: in ms times waiting decodes, as the cost is; for skips, net of what they are worth to
    those who wait for the UNet, so it may be negative.
    """

    chunks: int
    skips: int
    ms: float
    price: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is to be planned.

    stages: each with at least one option that takes no chunk. remaining: chunks left of each
    pending decode, in the order of service, all positive. budget_ms: for all stages together.
    tail_ms: at best for one chunk after the last stage. must_grant: an overdue decode: the first
    stage that offers chunks takes some.
    """

    stages: tuple[tuple[Option, ...], ...]
    remaining: tuple[int, ...]
    budget_ms: float
    tail_ms: float
    must_grant: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """An optimal choice.

    is_feasible: whether it keeps the budget; if not, no choice does, and this one is the best among
    those that exceed it least.
    """

    options: tuple[Option, ...]
    cost: float
    is_feasible: bool

    @property
    def ms(self) -> float:
        """Of all stages together."""
        return sum(option.ms for option in self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A problem in the numbers that the programme and its checks share.

    stages: the options that may be chosen. excess: of each, in buckets. num_buckets: excess
    allowed in all. unfinished: decodes unfinished by chunks done, up to the most a plan can do.
    tail: cost of what is left, by chunks done.
    """

    stages: tuple[tuple[Option, ...], ...]
    excess: tuple[tuple[int, ...], ...]
    num_buckets: int
    unfinished: tuple[int, ...]
    tail: tuple[float, ...]
    is_feasible: bool

    @classmethod
    def of(cls, problem: Problem) -> Model:
        """Count chunks, buckets and what is left."""
        total = sum(problem.remaining)
        stages = [tuple(one for one in stage if one.chunks <= total) for stage in problem.stages]
        if problem.must_grant and total:
            first = next(
                (i for i, stage in enumerate(stages) if any(one.chunks for one in stage)), None
            )
            if first is not None:
                stages[first] = tuple(one for one in stages[first] if one.chunks)
        shortest = [min(option.ms for option in stage) for stage in stages]
        slack = problem.budget_ms - sum(shortest)
        bucket = max(slack, 0.0) / NUM_BUCKETS
        excess = tuple(
            tuple(_buckets(option.ms - least, bucket) for option in stage)
            for stage, least in zip(stages, shortest, strict=True)
        )
        most = sum(max(option.chunks for option in stage) for stage in stages)
        reach = min(total, most)
        ends = list(accumulate(problem.remaining))
        finished = [bisect_right(ends, done) for done in range(reach + 1)]
        behind = list(accumulate(reversed(ends), initial=0))
        unfinished = tuple(len(ends) - count for count in finished)
        tail = tuple(
            problem.tail_ms * (behind[left] - left * done) for done, left in enumerate(unfinished)
        )
        return cls(
            stages=tuple(stages),
            excess=excess,
            num_buckets=NUM_BUCKETS,
            unfinished=unfinished,
            tail=tail,
            is_feasible=slack >= -EPSILON,
        )


def solve(problem: Problem) -> Solution:
    """The best choice of options; the same for the same problem."""
    model = Model.of(problem)
    to_go = _costs_to_go(model)
    done, left = 0, model.num_buckets
    chosen = []
    for i, stage in enumerate(model.stages):
        best, choice = inf, -1
        for j, option in enumerate(stage):
            after, rest = done + option.chunks, left - model.excess[i][j]
            if after >= len(model.unfinished) or rest < 0:
                continue
            cost = option.ms * model.unfinished[done] + option.price + to_go[i + 1][after, rest]
            if cost < best - EPSILON:
                best, choice = cost, j
        option = stage[choice]
        chosen.append(option)
        done += option.chunks
        left -= model.excess[i][choice]
    return Solution(
        options=tuple(chosen),
        cost=float(to_go[0][0, model.num_buckets]),
        is_feasible=model.is_feasible,
    )


def _costs_to_go(model: Model) -> list[NDArray[np.float64]]:
    """Least cost from each stage on, by (chunks done, buckets left); one array more for the end."""
    reach = len(model.unfinished) - 1
    unfinished = np.array(model.unfinished, dtype=np.float64)[:, None]
    # No more chunks can be done at a stage than those before it offer.
    heights = [0]
    for stage in model.stages:
        heights.append(min(reach, heights[-1] + max(option.chunks for option in stage)))
    end = np.array(model.tail)[: heights[-1] + 1, None]
    costs = [np.repeat(end, model.num_buckets + 1, axis=1)]
    # Stages share options, so what an option adds is worked out once.
    own_costs: dict[int, NDArray[np.float64]] = {}
    for stage, excess, height in zip(
        reversed(model.stages), reversed(model.excess), reversed(heights[:-1]), strict=True
    ):
        following = costs[-1]
        least = np.full((height + 1, model.num_buckets + 1), inf)
        for option, taken in zip(stage, excess, strict=True):
            rows = min(height, following.shape[0] - 1 - option.chunks) + 1
            if rows <= 0 or taken > model.num_buckets:
                continue
            target = least[:rows, taken:]
            source = following[
                option.chunks : option.chunks + rows, : model.num_buckets + 1 - taken
            ]
            own = own_costs.get(id(option))
            if own is None:
                own = own_costs[id(option)] = unfinished * option.ms + option.price
            np.minimum(target, source + own[:rows], out=target)
        costs.append(least)
    costs.reverse()
    return costs


def _buckets(excess_ms: float, bucket_ms: float) -> int:
    if excess_ms <= EPSILON:
        return 0
    if bucket_ms <= 0:
        return NUM_BUCKETS + 1
    return ceil(min(excess_ms / bucket_ms - EPSILON, NUM_BUCKETS + 1))


def greedy(problem: Problem) -> Solution:
    """At each stage the most chunks that the budget still allows, then the cheapest skips.

    What the planner is held against, and what serves with planning switched off: it looks at one
    stage at a time, leaving to the later ones what their shortest options need.
    """
    model = Model.of(problem)
    done, left = 0, model.num_buckets
    chosen = []
    cost = 0.0
    for stage, excess in zip(model.stages, model.excess, strict=True):
        allowed = [
            (option, taken)
            for option, taken in zip(stage, excess, strict=True)
            if taken <= left and done + option.chunks < len(model.unfinished)
        ]
        waiting = model.unfinished[done]
        option, taken = min(
            allowed,
            key=lambda pair: (-pair[0].chunks, pair[0].ms * waiting + pair[0].price, pair[1]),
        )
        cost += option.ms * waiting + option.price
        chosen.append(option)
        done += option.chunks
        left -= taken
    return Solution(
        options=tuple(chosen), cost=cost + model.tail[done], is_feasible=model.is_feasible
    )


def total_cost(problem: Problem, options: Sequence[Option]) -> float:
    """The objective of a sequence of options, whether or not it keeps the budget."""
    model = Model.of(problem)
    done, cost = 0, 0.0
    for option in options:
        cost += option.ms * model.unfinished[done] + option.price
        done += option.chunks
    return cost + model.tail[done]
