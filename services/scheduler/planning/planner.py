"""The planner: how many decode chunks and how many skipped rows go with each of the next slots.

A `Problem` is a row of *stages*, the device's next periods in order; of each stage's `Option`s one
is chosen. A UNet slot is a stage whose options differ in the chunks beside it and the rows skipped;
the gap ahead of a slot is a stage whose options decode so many chunks alone, or none in no time.
Chunks are served in the order of the decodes, so a plan is a sequence of options and nothing else:

    minimise   sum over stages of  ms * (decodes unfinished at its start) + price,
               + for what is unfinished at the end, the time its last chunk still takes at best,
                 and a price for each of its chunks
    subject to sum over stages of ms <= budget_ms, and no more chunks than there are.

That is a resource-constrained shortest path. Each stage's time above its shortest option, its
*excess*, is counted in buckets, rounded up; the dynamic programme goes backwards over (stage,
chunks done, excess left) and keeps the least cost to go of each. Rounding up means that a plan
found never exceeds the budget; a stage's shortest option costs no excess at all, so where any
sequence keeps the budget, the one of all the shortest options does and a plan is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, inf

import numpy as np
from numpy.typing import NDArray

NUM_BUCKETS = 32
"""Of the slack between the shortest sequence and the budget."""

EPSILON = 1e-9

_Move = tuple[int, int, NDArray[np.float64]]
"""An option in the tables: chunks it does, buckets it takes, its cost by state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to spend a stage."""

    chunks: int
    """Decoded."""
    skips: int
    """Rows skipped."""
    ms: float
    price: float = 0.0
    """In ms times waiting decodes, as the cost is; for skips, net of what they are worth to those
    who wait for the UNet, so it may be negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is to be planned."""

    stages: tuple[tuple[Option, ...], ...]
    """Each has an option that takes no chunk, and none is shorter."""
    remaining: tuple[int, ...]
    """Chunks left of each pending decode, in the order of service, all positive."""
    budget_ms: float
    """For all stages together."""
    tail_ms: float
    """At best for one chunk after the last stage."""
    tail_price: float = 0.0
    """Of each chunk left then."""
    must_grant: bool = False
    """Whether a decode is overdue, so that the first stage that offers chunks takes some."""
    num_ready: int | None = None
    """Chunks that are there from the beginning, None for all."""
    all_ready_at: int = 0
    """The stage by which the other chunks have come."""

    def limits(self) -> list[int]:
        """Return, by stage, how many chunks there are to be done by its end."""
        total = sum(self.remaining)
        ready = total if self.num_ready is None else min(self.num_ready, total)
        return [total if i >= self.all_ready_at else ready for i in range(len(self.stages))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """An optimal choice."""

    options: tuple[Option, ...]
    cost: float
    is_feasible: bool
    """Whether it keeps the budget; if not, no choice does, and this one is the best among those
    that exceed it least."""

    @property
    def ms(self) -> float:
        """Return the duration of all stages together."""
        return sum(option.ms for option in self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A problem in the numbers that the programme and its checks share."""

    stages: tuple[tuple[Option, ...], ...]
    """The options that may be chosen."""
    excess: tuple[tuple[int, ...], ...]
    """Of each, in buckets."""
    num_buckets: int
    """Excess allowed in all."""
    limits: tuple[int, ...]
    """Chunks that may be done by each stage's end."""
    unfinished: tuple[int, ...]
    """Decodes unfinished by chunks done, up to the most a plan can do."""
    tail: tuple[float, ...]
    """Cost of what is left, by chunks done."""
    is_feasible: bool

    @classmethod
    def of(cls, problem: Problem) -> Model:
        """Count chunks, buckets and what is left."""
        total, limits = sum(problem.remaining), problem.limits()
        stages = _allowed_stages(problem, limits)
        # Stages are mostly the same few objects, and what is worked out of one holds for all.
        distinct = {id(stage): stage for stage in stages}
        shortest = {name: min(option.ms for option in stage) for name, stage in distinct.items()}
        slack = problem.budget_ms - sum(shortest[id(stage)] for stage in stages)
        bucket = max(slack, 0.0) / NUM_BUCKETS
        excess = {
            name: tuple(_buckets(option.ms - shortest[name], bucket) for option in stage)
            for name, stage in distinct.items()
        }
        most = {name: max(option.chunks for option in stage) for name, stage in distinct.items()}
        reach = min(total, sum(most[id(stage)] for stage in stages))
        unfinished, tail = _ahead(problem, reach)
        return cls(
            stages=tuple(stages),
            excess=tuple(excess[id(stage)] for stage in stages),
            num_buckets=NUM_BUCKETS,
            limits=tuple(min(limit, reach) for limit in limits),
            unfinished=unfinished,
            tail=tail,
            is_feasible=slack >= -EPSILON,
        )


def _allowed_stages(problem: Problem, limits: Sequence[int]) -> list[tuple[Option, ...]]:
    """Return the stages with the options that may be chosen with so many chunks by each."""
    allowed: dict[tuple[int, int], tuple[Option, ...]] = {}
    stages = []
    for stage, limit in zip(problem.stages, limits, strict=True):
        if (id(stage), limit) not in allowed:
            allowed[id(stage), limit] = tuple(option for option in stage if option.chunks <= limit)
        stages.append(allowed[id(stage), limit])
    if problem.must_grant:
        for i, stage in enumerate(stages):
            granting = tuple(option for option in stage if option.chunks)
            if granting:
                stages[i] = granting
                break
    return stages


def _ahead(problem: Problem, reach: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return, by chunks done up to `reach`, unfinished decodes and the cost of what is left."""
    ends = list(accumulate(problem.remaining))
    total = ends[-1] if ends else 0
    behind = list(accumulate(reversed(ends), initial=0))
    unfinished, tail = [], []
    left = len(ends)
    for done in range(reach + 1):
        while left and ends[-left] <= done:
            left -= 1
        unfinished.append(left)
        waits = problem.tail_ms * (behind[left] - left * done)
        tail.append(waits + problem.tail_price * (total - done))
    return tuple(unfinished), tuple(tail)


def solve(problem: Problem) -> Solution:
    """Return the best choice of options; the same for the same problem."""
    model = Model.of(problem)
    to_go = _CostsToGo(model)
    done, left = 0, model.num_buckets
    chosen = []
    for i, (stage, excess) in enumerate(zip(model.stages, model.excess, strict=True)):
        best, choice = inf, -1
        for j, (option, taken) in enumerate(zip(stage, excess, strict=True)):
            after, rest = done + option.chunks, left - taken
            if after > model.limits[i] or rest < 0:
                continue
            cost = option.ms * model.unfinished[done] + option.price + to_go.at(i + 1, after, rest)
            if cost < best - EPSILON:
                best, choice = cost, j
        option = stage[choice]
        chosen.append(option)
        done += option.chunks
        left -= excess[choice]
    return Solution(
        options=tuple(chosen),
        cost=to_go.at(0, 0, model.num_buckets),
        is_feasible=model.is_feasible,
    )


class _CostsToGo:
    """Least cost from each stage on, by (chunks done, buckets left); one more for the end.

    Each stage's table is one flat array, a row of it being the buckets left at so many chunks done,
    followed by as many infinities as an option can take buckets. An option then leads from a whole
    table into the next one at one fixed distance, and running out of buckets leads to an infinity:
    two operations on contiguous numbers an option, whatever it takes and grants.
    """

    def __init__(self, model: Model) -> None:
        self._num_columns = model.num_buckets + 1
        self._pad = max(
            taken for excess in model.excess for taken in excess if taken <= model.num_buckets
        )
        self._width = self._num_columns + self._pad
        unfinished = np.repeat(np.array(model.unfinished, dtype=np.float64), self._width)
        self._scratch = np.empty_like(unfinished)
        # No more chunks can be done at a stage than those before it offer, or than there are.
        heights = [0]
        for stage, limit in zip(model.stages, model.limits, strict=True):
            heights.append(min(limit, heights[-1] + max(option.chunks for option in stage)))
        end = self._new_table(heights[-1])
        rows = end[self._pad :].reshape(-1, self._width)
        rows[:, : self._num_columns] = np.array(model.tail[: len(rows)])[:, None]
        self._tables = [end]
        # Stages are mostly the same few objects, so what their options add is worked out once.
        moves: dict[int, list[_Move]] = {}
        for stage, excess, height in zip(
            reversed(model.stages), reversed(model.excess), reversed(heights[:-1]), strict=True
        ):
            if id(stage) not in moves:
                moves[id(stage)] = [
                    (option.chunks, taken, unfinished * option.ms + option.price)
                    for option, taken in zip(stage, excess, strict=True)
                    if taken <= model.num_buckets
                ]
            self._tables.append(self._table(self._tables[-1], moves[id(stage)], height + 1))
        self._tables.reverse()

    def at(self, stage: int, done: int, left: int) -> float:
        """Return the least cost from a stage on; infinity where nothing keeps the budget."""
        return self._tables[stage].item(self._pad + done * self._width + left)

    def _new_table(self, height: int) -> NDArray[np.float64]:
        """Return infinities, also ahead of the first row, which has none before it to run into."""
        return np.full(self._pad + (height + 1) * self._width, inf)

    def _table(
        self, following: NDArray[np.float64], moves: list[_Move], num_rows: int
    ) -> NDArray[np.float64]:
        """Return the table of a stage from that of the next one."""
        pad, width, scratch = self._pad, self._width, self._scratch
        num_following = (len(following) - pad) // width
        table = self._new_table(num_rows - 1)
        least = table[pad:]
        for chunks, taken, own in moves:
            size = min(num_rows, num_following - chunks) * width
            if size <= 0:
                continue
            start = pad + chunks * width - taken
            target, sums = least[:size], scratch[:size]
            np.add(following[start : start + size], own[:size], out=sums)
            np.minimum(target, sums, out=target)
        if pad:
            least.reshape(-1, width)[:, self._num_columns :] = inf
        return table


def _buckets(excess_ms: float, bucket_ms: float) -> int:
    if excess_ms <= EPSILON:
        return 0
    if bucket_ms <= 0:
        return NUM_BUCKETS + 1
    return ceil(min(excess_ms / bucket_ms - EPSILON, NUM_BUCKETS + 1))


def greedy(problem: Problem) -> Solution:
    """Return, stage by stage, the most chunks that the budget allows, with the cheapest skips.

    What the planner is held against, and what serves with planning switched off: it looks at one
    stage at a time, leaving to the later ones what their shortest options need.
    """
    model = Model.of(problem)
    done, left = 0, model.num_buckets
    chosen = []
    cost = 0.0
    for stage, excess, limit in zip(model.stages, model.excess, model.limits, strict=True):
        allowed = [
            (option, taken)
            for option, taken in zip(stage, excess, strict=True)
            if taken <= left and done + option.chunks <= limit
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
    """Return the objective of a sequence of options, whether or not it keeps the budget."""
    model = Model.of(problem)
    done, cost = 0, 0.0
    for option in options:
        cost += option.ms * model.unfinished[done] + option.price
        done += option.chunks
    return cost + model.tail[done]
