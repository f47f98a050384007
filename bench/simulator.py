"""`synerdiff bench simulator`: the real stack against the simulator, for the same traces."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from bench.profiler import profile as measure_profile
from bench.real_stack import RealStack, Served, real_stack
from bench.report import write_report
from services.scheduler.policies import make_policy
from services.scheduler.profile import Profile
from services.scheduler.profile_file import parse_profile
from services.scheduler.simulation.arrivals import Arrival, Mix, make_arrivals
from services.scheduler.simulation.simulator import Simulation, SimulationSettings

POLICIES = ("continuous-serial", "continuous-parallel", "synerdiff")
LOADS = (0.5, 0.8)


def run(
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Less certain, under 50 s.")] = False,
    profile: Annotated[
        Path | None, typer.Option(help="The device's; measured in short if not given.")
    ] = None,
) -> dict[str, float]:
    """Serve the same Poisson traces by the real stack and by the simulator.

    Three policies at 0.5 and 0.8 of the least capacity among them, as simulated; mixed steps.
    Returns: `throughput_error`, `mean_latency_error`, the largest relative differences.
    """
    num_requests, loads = (8, LOADS[1:]) if quick else (150, LOADS)
    mix = Mix(num_steps=(4, 6, 8)) if quick else Mix()
    with tempfile.TemporaryDirectory(prefix="sd-bench-") as folder:
        path = profile or Path(folder) / "profile.json"
        if not profile:
            measure_profile(out=path, short=quick)
        known = parse_profile(path.read_text(), name=str(path))
        capacity = min(_capacity(known, policy, mix, seed) for policy in POLICIES)
        cells = []
        with real_stack(profile=path) as stack:
            stack.serve_by(POLICIES[0])
            stack.play(make_arrivals("backlog", rate=4, duration_s=1, mix=mix, seed=seed))
            for load in loads:
                rate = load * capacity
                trace = make_arrivals(
                    "poisson", rate=rate, duration_s=num_requests / rate, mix=mix, seed=seed
                )
                cells += [_compare(stack, known, policy, load, trace) for policy in POLICIES]
    line = {
        "throughput_error": max(cell["throughput_error"] for cell in cells),
        "mean_latency_error": max(cell["mean_latency_error"] for cell in cells),
    }
    report = {**line, "seed": seed, "is_quick": quick, "capacity_per_s": capacity, "cells": cells}
    write_report("simulator_quick" if quick else "simulator", report)
    return line


def _capacity(profile: Profile, policy: str, mix: Mix, seed: int) -> float:
    """Pictures a second from a standing backlog, simulated."""
    backlog = make_arrivals("backlog", rate=100, duration_s=1, mix=mix, seed=seed)
    return float(_simulate(profile, policy, backlog)["throughput_per_s"])


def _simulate(profile: Profile, policy: str, arrivals: Sequence[Arrival]) -> Mapping[str, Any]:
    return Simulation(profile, make_policy(policy), arrivals, SimulationSettings()).run().summary()


def _compare(
    stack: RealStack, profile: Profile, policy: str, load: float, trace: Sequence[Arrival]
) -> dict[str, Any]:
    stack.serve_by(policy)
    served = stack.play(trace)
    real = {
        "throughput_per_s": throughput_per_s(served),
        "mean_latency_s": mean(one.latency_s for one in served),
        "steps_skipped": sum(one.num_skipped for one in served)
        / sum(one.num_steps for one in served),
    }
    summary = _simulate(profile, policy, trace)
    simulated = {
        "throughput_per_s": summary["throughput_per_s"],
        "mean_latency_s": summary["latency_s"]["mean"],
        "steps_skipped": summary["steps_skipped"],
    }
    cell = {
        "policy": policy,
        "load": load,
        "requests": len(trace),
        "real": real,
        "simulated": simulated,
        "throughput_error": _error(simulated, real, "throughput_per_s"),
        "mean_latency_error": _error(simulated, real, "mean_latency_s"),
    }
    print(
        f"{policy} at {load}: mean latency {real['mean_latency_s']:.2f} s, "
        f"simulated {simulated['mean_latency_s']:.2f} s"
    )
    return cell


def throughput_per_s(served: Sequence[Served]) -> float:
    """Pictures a second from the first request to the last answer."""
    first = min(one.submitted_s for one in served)
    return len(served) / (max(one.finished_s for one in served) - first)


def _error(simulated: Mapping[str, float], real: Mapping[str, float], key: str) -> float:
    return abs(simulated[key] / real[key] - 1)
