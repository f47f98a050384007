"""The planner's answers against brute force over its own model, and its promises."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from bench.plan_problems import agrees, brute_force, random_problem
from services.scheduler.planning.model import Option, Problem
from services.scheduler.planning.planner import greedy, solve, total_cost


def test_a_plan_costs_what_brute_force_finds() -> None:
    chance = random.Random(5)
    for _ in range(250):
        problem = random_problem(chance, num_slots=2, num_decodes=chance.randint(0, 4))
        solution = solve(problem)
        assert agrees(solution.cost, brute_force(problem))
        assert agrees(total_cost(problem, solution.options), solution.cost)


def test_a_feasible_plan_keeps_the_budget_and_an_infeasible_one_says_so() -> None:
    chance = random.Random(6)
    seen = set()
    for _ in range(150):
        problem = random_problem(chance, num_slots=4, num_decodes=5)
        solution = solve(problem)
        seen.add(solution.is_feasible)
        shortest = sum(min(option.ms for option in stage) for stage in problem.stages)
        if solution.is_feasible:
            assert solution.ms <= problem.budget_ms * (1 + 1e-9)
        elif not problem.must_grant:
            assert shortest > problem.budget_ms
            assert solution.ms == pytest.approx(shortest)
    assert seen == {True, False}


def test_a_plan_is_never_worse_than_greedy() -> None:
    chance = random.Random(7)
    for _ in range(100):
        problem = random_problem(chance, num_slots=6, num_decodes=16)
        assert solve(problem).cost <= greedy(problem).cost * (1 + 1e-9)


def test_the_same_problem_gives_the_same_plan() -> None:
    problem = random_problem(random.Random(8), num_slots=5, num_decodes=9)
    assert solve(problem) == solve(problem)


def test_an_overdue_decode_gets_chunks_though_the_budget_has_none() -> None:
    gap = (Option(chunks=0, skips=0, ms=0.0), Option(chunks=1, skips=0, ms=10.0))
    slot = (Option(chunks=0, skips=0, ms=50.0),)
    calm = Problem(stages=(gap, slot), remaining=(4,), budget_ms=50.0, tail_ms=10.0)
    assert [option.chunks for option in solve(calm).options] == [0, 0]
    overdue = Problem(
        stages=(gap, slot), remaining=(4,), budget_ms=50.0, tail_ms=10.0, must_grant=True
    )
    forced = solve(overdue)
    assert [option.chunks for option in forced.options] == [1, 0]
    assert not forced.is_feasible


def test_chunks_that_come_later_are_planned_for_where_they_will_be() -> None:
    slot = (Option(chunks=0, skips=0, ms=50.0), Option(chunks=2, skips=0, ms=52.0))
    problem = Problem(
        stages=(slot, slot, slot), remaining=(2,), budget_ms=200.0, tail_ms=30.0, tail_price=90.0
    )
    assert [option.chunks for option in solve(problem).options] == [2, 0, 0]
    late = replace(problem, num_ready=1, all_ready_at=1)
    assert [option.chunks for option in solve(late).options] == [0, 2, 0]
    assert [option.chunks for option in greedy(late).options] == [0, 2, 0]


def test_without_decodes_a_skip_is_taken_only_where_it_is_worth_its_price() -> None:
    def choose(price: float) -> int:
        slot = (
            Option(chunks=0, skips=0, ms=50.0),
            Option(chunks=0, skips=4, ms=40.0, price=price),
        )
        problem = Problem(stages=(slot,), remaining=(), budget_ms=60.0, tail_ms=1.0)
        return solve(problem).options[0].skips

    assert choose(1.0) == 0
    assert choose(-1.0) == 4
