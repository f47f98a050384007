"""How one cell of `bench policies` is measured, on any stack that serves by a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any, Final, Protocol

from bench.contenders import BY_NAME
from bench.device_speed import TimesSlots, device_slowdown
from bench.policies_cells import Cell, Plan, Samples, throughput
from bench.real_stack import Served, throughput_per_s
from bench.report import percentile
from services.scheduler.devices.profile import Profile
from services.scheduler.simulation.arrivals import Arrival, make_arrivals

LOADS: Final = tuple(1.07**-power for power in range(30))
"""Tried for the capacity, of the highest throughput of any contender: the same loads for all."""

LEAST_SHARE: Final = 0.4
"""Of a contender's own throughput; lower loads are not tried, and its capacity then counts as 0."""

CARRIED: Final = 3.0
"""A load is carried where P95 latency stays within so many times the least unloaded one of any
contender: one bar for all, or who waits for a full batch when alone could be late at any load."""

Sample = dict[str, Any]


class Stack(TimesSlots, Protocol):
    """The real services, or the simulator."""

    def serve_by(self, policy: str) -> None:
        """Serve by that policy from now on."""

    def play(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Serve every request at its time."""
        ...

    def play_within(
        self, arrivals: Sequence[Arrival], *, limit_s: float, max_late: int
    ) -> list[Served] | None:
        """The same; None if more than `max_late` requests took more than `limit_s`."""
        ...


def measure(stack: Stack, cell: Cell, plan: Plan, samples: Samples, profile: Profile) -> Sample:
    """One cell. samples: of earlier ones. profile: of the device."""
    policy = BY_NAME[cell.contender].policy
    if cell.kind in {"throughput", "standing"}:
        before = device_slowdown(stack, profile)
        stack.serve_by(policy)
        count = plan.num_standing if cell.kind == "standing" else plan.num_in_backlog
        figures = _throughput(stack, cell, plan, count)
        return {**figures, "slowdown": mean((before, device_slowdown(stack, profile)))}
    stack.serve_by(policy)
    match cell.kind:
        case "unloaded":
            return _unloaded(stack, cell, plan)
        case "capacity":
            return _capacity(stack, cell, plan, samples)
        case _:
            load = cell.load(samples)
            return _figures(stack.play(_trace(plan, load, cell.seed))) | {"load_per_s": load}


def _throughput(stack: Stack, cell: Cell, plan: Plan, count: int) -> Sample:
    """From a standing backlog."""
    backlog = make_arrivals("backlog", rate=count, duration_s=1, mix=plan.mix, seed=cell.seed)
    return _figures(stack.play(backlog))


def _unloaded(stack: Stack, cell: Cell, plan: Plan) -> Sample:
    """Requests of the mix, one after the other."""
    served: list[Served] = []
    for arrival in _trace(plan, 1.0, cell.seed)[: plan.num_unloaded]:
        served += stack.play([replace(arrival, at_s=0.0)])
    figures = _figures(served)
    return {name: value for name, value in figures.items() if name != "throughput_per_s"}


def _capacity(stack: Stack, cell: Cell, plan: Plan, samples: Samples) -> Sample:
    """The highest load that is carried, by bisection, and what was seen at each that was tried.

    Loads above the contender's own throughput can't be carried and are not tried, nor those below
    `LEAST_SHARE` of it.
    """
    own = throughput(BY_NAME[cell.contender], samples)
    highest = max(throughput(one, samples) for one in plan.contenders)
    loads = sorted(load for share in LOADS if LEAST_SHARE * own <= (load := share * highest) <= own)
    unloaded = [one["p95_s"] for name, one in samples.items() if name.startswith("unloaded/")]
    limit_s = CARRIED * min(unloaded)
    tried = []
    carried, too_high = -1, len(loads)
    while too_high - carried > 1:
        index = (carried + too_high) // 2
        trace = _trace(plan, loads[index], cell.seed)
        served = stack.play_within(trace, limit_s=limit_s, max_late=round(0.05 * len(trace)))
        figures = _figures(served) if served else {}
        is_carried = bool(figures) and figures["p95_s"] <= limit_s
        tried.append({**figures, "load_per_s": loads[index], "is_carried": is_carried})
        if is_carried:
            carried = index
        else:
            too_high = index
    capacity = loads[carried] if carried >= 0 else 0.0
    return {"capacity_per_s": capacity, "limit_s": limit_s, "tried": tried}


def _trace(plan: Plan, load_per_s: float, seed: int) -> list[Arrival]:
    """So many Poisson arrivals, the same requests at every load."""
    count = plan.num_requests
    trace = make_arrivals(
        "poisson", rate=1.0, duration_s=2.0 * count + 50, mix=plan.mix, seed=seed
    )[:count]
    return [replace(one, at_s=one.at_s / load_per_s) for one in trace]


def _figures(served: Sequence[Served]) -> Sample:
    """Latencies of all, the rate from the first request to the last answer, and raw samples."""
    latencies = [one.latency_s for one in served]
    return {
        "throughput_per_s": throughput_per_s(served),
        "rows_per_picture": mean(one.num_rows for one in served),
        "mean_s": mean(latencies),
        "p95_s": percentile(latencies, 0.95),
        "p99_s": percentile(latencies, 0.99),
        "served": [
            (one.submitted_s, one.finished_s, one.num_steps, one.is_guided, one.num_skipped)
            for one in served
        ],
    }
