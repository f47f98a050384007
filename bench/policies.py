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
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from bench.contenders import BY_NAME
from bench.policies_cells import Cell, Plan, next_cells
from bench.policies_measure import Sample, Stack, measure
from bench.policies_report import plot_loads, summarise
from bench.profiler import profile as measure_profile
from bench.real_stack import real_stack
from bench.report import REPORTS, machine, write_report
from bench.simulated_stack import SimulatedStack
from launch.stack import COMPILED_KERNELS, WORKER_ENVIRONMENT
from services.scheduler.devices.profile import Profile
from services.scheduler.devices.profile_file import parse_profile

AS_MOST_PEOPLE_DO: Final = COMPILED_KERNELS | {"SYNERDIFF_SPLIT_ROWS": "false"}
"""The workers' environment with default threads: all of them share each operation."""


def run(  # noqa: PLR0917 - options of a command
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Less certain, under 50 s.")] = False,
    cell: Annotated[int, typer.Option(help="Measure this cell of the list again.")] = -1,
    requests: Annotated[int, typer.Option(help="Of a trace; 400 are the full form.")] = 400,
    seeds: Annotated[int, typer.Option(help="Runs of everything; 3 are the full form.")] = 3,
    max_cells: Annotated[int, typer.Option(help="Stop after so many; 0 measures all.")] = 0,
    simulated: Annotated[
        Path | None, typer.Option(help="Simulate on this profile instead of measuring.")
    ] = None,
) -> dict[str, Any]:
    """Measure what is still missing, and compare.

    Returns: `naive`, `best`, `best_equal_skip`: `name` of the baseline (default threads; the best
    tuned; the best tuned that skips, too), `throughput_ratio` (at the same speed of the device),
    `mean_latency_reduction` and `p99_latency_reduction` of synerdiff against it; and
    `attained_over_ceiling`.
    """
    plan = Plan.quick(seed) if quick else Plan.full(seed, num_seeds=seeds, num_requests=requests)
    suffix = (f"_simulated_{simulated.stem}" if simulated else "") + ("_quick" if quick else "")
    samples_path = REPORTS / f"policies_samples{suffix}.json"
    is_kept = samples_path.exists() and not quick
    samples: dict[str, Sample] = json.loads(samples_path.read_text()) if is_kept else {}
    profile_path = simulated or REPORTS / f"policies_profile{suffix}.json"
    REPORTS.mkdir(exist_ok=True)
    if not simulated and (quick or not profile_path.exists()):
        measure_profile(out=profile_path, short=quick)
    profile = parse_profile(profile_path.read_text(), name=str(profile_path))
    repeated = [next_cells(plan, samples, only_missing=False)[cell]] if cell >= 0 else []
    num_measured = 0
    with _simulated_stacks(profile) if simulated else _real_stacks(profile_path) as stack_of:
        while todo := repeated or next_cells(plan, samples, only_missing=True):
            one = todo[0]
            sample = measure(stack_of(one), one, plan, samples, profile)
            samples[one.name] = {**sample, "at": machine()["commit"]}
            samples_path.write_text(json.dumps(samples) + "\n")
            shown = {key: value for key, value in sample.items() if key not in {"served", "tried"}}
            print(f"{one.name}: {json.dumps(shown)}", flush=True)
            num_measured += 1
            if repeated or 0 < max_cells <= num_measured:
                break
    report: dict[str, Any] = {
        "is_simulated": bool(simulated),
        "profile": dict(profile.notes),
        **summarise(plan, samples, profile),
    }
    write_report(f"policies{suffix}", report)
    if not quick:
        plot_loads(samples, REPORTS / f"policies{suffix}.png")
    line: dict[str, Any] = report["line"]
    return line


StackOf = Callable[[Cell], Stack]
"""The stack of a cell."""


@contextlib.contextmanager
def _simulated_stacks(profile: Profile) -> Iterator[StackOf]:
    """One simulator for all."""
    stack = SimulatedStack(profile)
    yield lambda _: stack


@contextlib.contextmanager
def _real_stacks(profile: Path) -> Iterator[StackOf]:
    """One stack with our workers, one with default threads, each started when it is needed."""
    with contextlib.ExitStack() as all_of_them:
        running: dict[bool, Stack] = {}

        def stack_of(cell: Cell) -> Stack:
            is_default = BY_NAME[cell.contender].has_default_threads
            if is_default not in running:
                environment = AS_MOST_PEOPLE_DO if is_default else WORKER_ENVIRONMENT
                stack = all_of_them.enter_context(
                    real_stack(profile=profile, worker_environment=environment)
                )
                stack.warm_up(BY_NAME[cell.contender].policy)
                running[is_default] = stack
            return running[is_default]

        yield stack_of
