"""Random planning problems, and brute force over the planner's own model."""

from __future__ import annotations

import random
from itertools import product
from math import inf

from services.scheduler.planning.model import EPSILON, Model, Option, Problem


def brute_force(problem: Problem) -> float:
    """The least cost over every sequence of options that keeps the budget in buckets."""
    model = Model.of(problem)
    best = inf
    for choice in product(*(range(len(stage)) for stage in model.stages)):
        done, taken, cost = 0, 0, 0.0
        for i, j in enumerate(choice):
            option = model.stages[i][j]
            taken += model.excess[i][j]
            if taken > model.num_buckets or done + option.chunks > model.limits[i]:
                break
            cost += option.ms * model.unfinished[done] + option.price
            done += option.chunks
        else:
            best = min(best, cost + model.tail[done])
    return best


def agrees(cost: float, reference: float) -> bool:
    """Whether two costs are the same but for rounding."""
    return abs(cost - reference) <= EPSILON * max(1.0, abs(reference)) * 10


def random_problem(chance: random.Random, *, num_slots: int, num_decodes: int) -> Problem:
    """A window of slots with gaps: overlap that may or may not pay, skips at some price."""
    step_ms = chance.uniform(5, 200)
    chunk_ms = chance.uniform(1, 60)
    overlap = chance.uniform(-0.3, 0.9)
    counts = chance.choice([(1, 2), (1, 2, 4), (1,), (2, 4)])
    stages: list[tuple[Option, ...]] = []
    for _ in range(num_slots):
        gap = [Option(chunks=0, skips=0, ms=0.0)]
        gap += [Option(chunks=k, skips=0, ms=k * chunk_ms + 2) for k in counts]
        slot = []
        alone_ms = step_ms * chance.uniform(0.6, 1.4)
        eligible = chance.randrange(3)
        for skips in sorted({0, eligible}):
            saved = 0.06 * skips * alone_ms
            price = chance.uniform(-2, 3) * saved
            for k in (0, *counts):
                ms = alone_ms - saved + k * chunk_ms * (1 - overlap)
                slot.append(Option(chunks=k, skips=skips, ms=max(ms, 1.0), price=price))
        stages += [tuple(gap), tuple(slot)]
    remaining = tuple(sorted(chance.randint(1, 6) for _ in range(num_decodes)))
    is_all_ready = chance.random() < 0.5  # noqa: PLR2004  a coin
    alone = sum(max(option.ms for option in stage if not option.chunks) for stage in stages)
    return Problem(
        stages=tuple(stages),
        remaining=remaining,
        budget_ms=alone / chance.uniform(0.45, 1.05),
        tail_ms=chunk_ms * min(1.0, 1 - overlap),
        tail_price=chance.choice([0.0, chance.uniform(0, 5) * chunk_ms]),
        must_grant=chance.random() < 0.1,  # noqa: PLR2004  one in ten
        num_ready=None if is_all_ready else chance.randrange(sum(remaining) + 1),
        all_ready_at=chance.randrange(len(stages) + 1),
    )
