"""`synerdiff bench plan`: how fast and how good the scheduler's plans are.

Quality: the planner against brute force over its own model on small random problems, and against
greedy on large ones. Speed: one call of the policy (packing, window, planning) for 64 active
requests and 16 pending decodes, and its growth to 1,024 requests; and slots per second of one core
over many device groups, every message encoded and decoded by the wire's codec. Times are of the
thread (`time.thread_time_ns`), so that a busy machine counts as little as possible.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from typing import Any

from bench.plan_problems import agrees, brute_force, random_problem
from bench.report import percentile, spread, write_report
from bench.scheduler_load import EchoGroup, make_view
from services.scheduler.core.commands import Send
from services.scheduler.core.core import Core, CoreSettings
from services.scheduler.devices.profile_file import parse_profile
from services.scheduler.planning.planner import greedy, solve, total_cost
from services.scheduler.planning.policies import make_policy
from shared import codec
from shared.messages import DenoiseSlot
from shared.settings import SHIPPED_PROFILES

PROFILE = SHIPPED_PROFILES / "assumed" / "a100-sd15.json"
"""Beside kinds of four sizes: the most options a window can have."""

NUM_ACTIVE = 64
NUM_DECODES = 16


def plan(seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Measure plans: optimal against brute force, fast enough, and slots per second."""
    chance = random.Random(seed)
    instances = 300 if quick else 2_000
    worse_than_brute, worst_gap = _against_brute_force(chance, instances)
    large = 60 if quick else 500
    worse_than_greedy, gain = _against_greedy(chance, large)
    repeats = 200 if quick else 2_000
    times_ms = _plan_times_ms(NUM_ACTIVE, NUM_DECODES, repeats=repeats, seed=seed)
    growth = {
        str(count): spread(_plan_times_ms(count, NUM_DECODES, repeats=40, seed=seed))
        for count in (16, 64, 256, 1_024)
    }
    rates = [
        _slots_per_s(num_groups=32, num_slots=300 if quick else 3_000)
        for _ in range(2 if quick else 5)
    ]
    line = {
        "plan_p99_ms": percentile(times_ms, 0.99),
        "mismatches": worse_than_brute + worse_than_greedy,
        "instances": instances,
        "slots_per_s": sorted(rates)[len(rates) // 2],
    }
    write_report(
        "plan_quick" if quick else "plan",
        {
            **line,
            "seed": seed,
            "is_quick": quick,
            "worst_relative_gap": worst_gap,
            "large_instances": large,
            "worse_than_greedy": worse_than_greedy,
            "cost_saved_over_greedy": gain,
            "plan_ms": spread(times_ms),
            "plan_p99_over_shortest_slot": percentile(times_ms, 0.99) / _shortest_slot_ms(),
            "plan_ms_by_active_requests": growth,
            "slots_per_s_samples": rates,
        },
    )
    return line


run = plan


def _against_brute_force(chance: random.Random, count: int) -> tuple[int, float]:
    """Problems on which the two differ, and the largest relative difference."""
    mismatches, worst = 0, 0.0
    for i in range(count):
        # Three slots are some 10^4 sequences; most problems have two.
        slots = 3 if i % 20 == 0 else 2
        problem = random_problem(chance, num_slots=slots, num_decodes=chance.randint(0, 4))
        solution, reference = solve(problem), brute_force(problem)
        worst = max(worst, abs(solution.cost - reference) / max(abs(reference), 1.0))
        is_same = agrees(solution.cost, reference) and agrees(
            total_cost(problem, solution.options), solution.cost
        )
        mismatches += not is_same
    return mismatches, worst


def _against_greedy(chance: random.Random, count: int) -> tuple[int, float]:
    """Problems on which greedy is better, and the mean share of greedy's cost that is saved."""
    worse, saved = 0, 0.0
    for _ in range(count):
        problem = random_problem(chance, num_slots=6, num_decodes=NUM_DECODES)
        best, other = solve(problem).cost, greedy(problem).cost
        worse += best > other + 1e-6 * abs(other)
        saved += (other - best) / abs(other) if other else 0.0
    return worse, saved / count


def _shortest_slot_ms() -> float:
    """Of the profile's own size, full of requests that all skip their guidance."""
    profile = parse_profile(PROFILE.read_text())
    size = profile.slots[0].key
    return profile.slot_ms(size, profile.knee(size) // 2, profile.alone_kind(size))[0]


def _plan_times_ms(num_active: int, num_decodes: int, *, repeats: int, seed: int) -> list[float]:
    """Thread time of one planning call each, on views that differ."""
    profile = parse_profile(PROFILE.read_text())
    policy = make_policy("synerdiff")
    chance = random.Random(seed)
    views = [make_view(chance, profile, num_active, num_decodes) for _ in range(20)]
    times = []
    for view in itertools.islice(itertools.cycle(views), repeats):
        start = time.thread_time_ns()
        policy.plan(view)
        times.append((time.thread_time_ns() - start) / 1e6)
    return times


def _slots_per_s(*, num_groups: int, num_slots: int) -> float:
    """Slots planned, sent and reported a second of one core, over many device groups."""
    profile = parse_profile(PROFILE.read_text())
    core = Core(
        epoch=1,
        policy=make_policy("synerdiff"),
        settings=CoreSettings(recovery_s=0.0, profiles=(profile,)),
        now=0.0,
    )
    groups = {}
    inbox: deque[bytes] = deque()
    for number in range(num_groups):
        group = EchoGroup(number, profile)
        groups.update(dict.fromkeys(group.incarnations, group))
        inbox += [codec.encode(message) for message in group.first_messages()]
    inbox += [codec.encode(message) for message in EchoGroup.requests(profile, 12 * num_groups)]
    done = 0
    start = time.thread_time()
    while inbox and done < num_slots:
        events = [codec.decode(inbox.popleft()) for _ in range(min(len(inbox), 64))]
        for command in core.on_events(events, time.thread_time()):  # type: ignore[arg-type]
            if isinstance(command, Send):
                message = codec.decode(codec.encode(command.message))
                done += isinstance(message, DenoiseSlot)
                answers = groups[command.incarnation].answer(command.incarnation, message)
                inbox += [codec.encode(answer) for answer in answers]
    return done / (time.thread_time() - start)


if __name__ == "__main__":
    import json
    import sys

    print(json.dumps(plan(quick="--quick" in sys.argv)))
