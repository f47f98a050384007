"""A planning problem, and the same in the numbers that the planner counts in.

A `Problem` is a row of *stages*, the device's next periods in order; of each stage's `Option`s one
is chosen. A UNet slot is a stage whose options differ in the chunks beside it and the rows skipped;
the gap ahead of a slot is a stage whose options decode so many chunks alone, or none in no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

NUM_BUCKETS = 32
"""Of the slack between the shortest sequence and the budget."""

EPSILON = 1e-9


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


def _buckets(excess_ms: float, bucket_ms: float) -> int:
    if excess_ms <= EPSILON:
        return 0
    if bucket_ms <= 0:
        return NUM_BUCKETS + 1
    return ceil(min(excess_ms / bucket_ms - EPSILON, NUM_BUCKETS + 1))
