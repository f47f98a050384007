"""`synerdiff bench policies`: SynerDiff against the other batching policies, on the real stack.

What is measured is a list of cells: a contender's throughput from a standing backlog, its latencies
unloaded, its capacity, its latencies at a load. They alternate between the contenders, seed after
seed. Their raw samples are kept in `reports/policies_samples.json` with the commit they were taken
at, so that a run can be interrupted and goes on where it was; `bench.policies_report` compares.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, Final

import typer

from bench.contenders import BY_NAME
from bench.policies_cells import Cell, Plan, next_cells
from bench.policies_report import plot_loads, summarise
from bench.profiler import profile as measure_profile
from bench.real_stack import RealStack, Served, real_stack
from bench.report import REPORTS, machine, percentile, write_report
from cli.stack import WORKER_ENVIRONMENT
from services.scheduler.profile_file import parse_profile
from services.scheduler.simulation.arrivals import Arrival, make_arrivals

LOADS: Final = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Tried for the capacity, of the throughput with a standing backlog, until one can be carried."""

CARRIED: Final = 3.0
"""A load is carried where P95 latency stays within so many times the unloaded one."""

Sample = dict[str, Any]


def run(  # noqa: PLR0917 - options of a command
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Less certain, under 50 s.")] = False,
    cell: Annotated[int, typer.Option(help="Measure this cell of the list again.")] = -1,
    requests: Annotated[int, typer.Option(help="Of a trace; 400 are the full form.")] = 400,
    seeds: Annotated[int, typer.Option(help="Runs of everything; 3 are the full form.")] = 3,
    max_cells: Annotated[int, typer.Option(help="Stop after so many; 0 measures all.")] = 0,
) -> dict[str, Any]:
    """Measure what is still missing, and compare.

    Returns: `naive`, `best`, `best_equal_skip`: `name` of the baseline (default threads; the best
    tuned; the best tuned that skips, too), `throughput_ratio`, `mean_latency_reduction` and
    `p99_latency_reduction` of synerdiff against it; and `attained_over_ceiling`.
    """
    plan = Plan.quick(seed) if quick else Plan.full(seed, num_seeds=seeds, num_requests=requests)
    suffix = "_quick" if quick else ""
    samples_path = REPORTS / f"policies_samples{suffix}.json"
    samples = {} if quick or not samples_path.exists() else json.loads(samples_path.read_text())
    profile_path = REPORTS / f"policies_profile{suffix}.json"
    REPORTS.mkdir(exist_ok=True)
    if quick or not profile_path.exists():
        measure_profile(out=profile_path, repeats=2 if quick else 9)
    if cell >= 0:
        samples.pop(next_cells(plan, samples, only_missing=False)[cell].name, None)
    num_measured = 0
    with _stacks(profile_path) as stack_of:
        while missing := next_cells(plan, samples, only_missing=True):
            one = missing[0]
            sample = _measure(stack_of(one), one, plan, samples)
            samples[one.name] = {**sample, "at": machine()["commit"]}
            samples_path.write_text(json.dumps(samples) + "\n")
            shown = {key: value for key, value in sample.items() if key != "served"}
            print(f"{one.name}: {json.dumps(shown)}", flush=True)
            num_measured += 1
            if 0 < max_cells <= num_measured or cell >= 0:
                break
    report = summarise(plan, samples, parse_profile(profile_path.read_text()))
    write_report(f"policies{suffix}", report)
    if not quick:
        plot_loads(samples, REPORTS / "policies.png")
    line: dict[str, Any] = report["line"]
    return line


@contextlib.contextmanager
def _stacks(profile: Path) -> Iterator[Callable[[Cell], RealStack]]:
    """A function from a cell to its stack: one with our workers, one with default threads."""
    with contextlib.ExitStack() as all_of_them:
        running: dict[bool, RealStack] = {}

        def stack_of(cell: Cell) -> RealStack:
            contender = BY_NAME[cell.contender]
            is_default = contender.has_default_threads
            if is_default not in running:
                environment = {} if is_default else WORKER_ENVIRONMENT
                running[is_default] = all_of_them.enter_context(
                    real_stack(profile=profile, worker_environment=environment)
                )
            running[is_default].serve_by(contender.policy)
            return running[is_default]

        yield stack_of


def _measure(stack: RealStack, cell: Cell, plan: Plan, samples: dict[str, Sample]) -> Sample:
    match cell.kind:
        case "throughput":
            backlog = make_arrivals(
                "backlog", rate=plan.num_in_backlog, duration_s=1, mix=plan.mix, seed=cell.seed
            )
            return _figures(stack.play(backlog))
        case "unloaded":
            return _unloaded(stack, cell, plan)
        case "capacity":
            return _capacity(stack, cell, plan, samples)
        case _:
            load = cell.load(samples)
            return _figures(stack.play(_trace(plan, load, cell.seed))) | {"load_per_s": load}


def _unloaded(stack: RealStack, cell: Cell, plan: Plan) -> Sample:
    """Requests of the mix, one after the other."""
    served: list[Served] = []
    for arrival in _trace(plan, 1.0, cell.seed)[: plan.num_unloaded]:
        served += stack.play([replace(arrival, at_s=0.0)])
    return _figures(served)


def _capacity(stack: RealStack, cell: Cell, plan: Plan, samples: dict[str, Sample]) -> Sample:
    """The highest load of the list that is carried, and what was seen at each that was tried."""
    throughput = mean(
        samples[f"throughput/{seed}/{cell.contender}"]["throughput_per_s"] for seed in plan.seeds
    )
    limit_s = CARRIED * samples[f"unloaded/{cell.seed}/{cell.contender}"]["p95_s"]
    tried = []
    for share in LOADS:
        load = share * throughput
        trace = _trace(plan, load, cell.seed)
        served = stack.play_within(trace, limit_s=limit_s, max_late=round(0.05 * len(trace)))
        if served is None:
            tried.append({"load_per_s": load, "is_carried": False})
            continue
        figures = _figures(served)
        is_carried = figures["p95_s"] <= limit_s
        tried.append({**figures, "load_per_s": load, "is_carried": is_carried})
        if is_carried:
            return {"capacity_per_s": load, "limit_s": limit_s, "tried": tried}
    return {"capacity_per_s": 0.0, "limit_s": limit_s, "tried": tried}


def _trace(plan: Plan, load_per_s: float, seed: int) -> list[Arrival]:
    """So many Poisson arrivals, the same requests at every load."""
    count = plan.num_requests
    trace = make_arrivals(
        "poisson", rate=1.0, duration_s=2.0 * count + 50, mix=plan.mix, seed=seed
    )[:count]
    return [replace(one, at_s=one.at_s / load_per_s) for one in trace]


def _figures(served: list[Served]) -> Sample:
    """Latencies of all; throughput of the middle, where the device is full; the raw samples."""
    ordered = sorted(served, key=lambda one: one.finished_s)
    first, last = len(ordered) // 6, len(ordered) - 1 - len(ordered) // 4
    middle = ordered[first + 1 : last + 1]
    span_s = ordered[last].finished_s - ordered[first].finished_s
    latencies = [one.latency_s for one in served]
    return {
        "throughput_per_s": len(middle) / span_s if span_s > 0 else 0.0,
        "rows_per_picture": mean(one.num_rows for one in middle) if middle else 0.0,
        "mean_s": mean(latencies),
        "p95_s": percentile(latencies, 0.95),
        "p99_s": percentile(latencies, 0.99),
        "served": [
            (one.submitted_s, one.finished_s, one.num_steps, one.is_guided, one.num_skipped)
            for one in served
        ],
    }
