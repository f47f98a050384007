"""The planner: how many decode chunks and how many skipped rows go with each of the next slots.

Of each of a problem's stages (`model`) one option is chosen. Chunks are served in the order of the
decodes, so a plan is a sequence of options and nothing else:

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
from math import inf

import numpy as np
from numpy.typing import NDArray

from services.scheduler.planning.model import EPSILON, Model, Option, Problem

_Move = tuple[int, int, NDArray[np.float64]]
"""An option in the tables: chunks it does, buckets it takes, its cost by state."""


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
