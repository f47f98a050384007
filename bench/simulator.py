"""`synerdiff bench simulator`: the real stack against the simulator, for the same traces."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, mean
from typing import Annotated, Any

import typer

from bench.contenders import make_policy
from bench.device_speed import slowdowns_by_rows, slowed_down
from bench.profiler import profile as measure_profile
from bench.real_stack import RealStack, real_stack, throughput_per_s
from bench.report import write_report
from services.scheduler.devices.profile import Profile
from services.scheduler.devices.profile_file import parse_profile
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

    Three policies at 0.5 and 0.8 of the least capacity among them, as simulated; mixed steps. The
    simulated device is as much slower than its profile as the real one was right before and after
    each trace.
    Returns: `throughput_error`, `mean_latency_error`, the largest relative differences.
    """
    num_requests, num_traces, loads = (8, 1, LOADS[1:]) if quick else (150, 3, LOADS)
    mix = Mix(num_steps=(4, 6, 8)) if quick else Mix()
    with tempfile.TemporaryDirectory(prefix="sd-bench-") as folder:
        path = profile or Path(folder) / "profile.json"
        if not profile:
            measure_profile(out=path, short=quick)
        known = parse_profile(path.read_text(), name=str(path))
        cells = []
        with real_stack(profile=path) as stack:
            now = slowed_down(known, slowdowns_by_rows(stack, known))
            capacity = min(_capacity(now, policy, mix, seed) for policy in POLICIES)
            for policy in POLICIES[:1] if quick else POLICIES:
                stack.warm_up(policy)
            for load in loads:
                rate = load * capacity
                duration_s = num_requests / rate / num_traces
                traces = [
                    make_arrivals("poisson", rate=rate, duration_s=duration_s, mix=mix, seed=one)
                    for one in range(seed, seed + num_traces)
                ]
                cells += [_compare(stack, known, policy, load, traces) for policy in POLICIES]
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
    stack: RealStack,
    profile: Profile,
    policy: str,
    load: float,
    traces: Sequence[Sequence[Arrival]],
) -> dict[str, Any]:
    """The traces one after the other, each simulated at the device's speed around it."""
    slowdowns = [slowdowns_by_rows(stack, profile)]
    served, simulated = [], []
    for trace in traces:
        stack.serve_by(policy)
        served.append(stack.play(trace))
        slowdowns.append(slowdowns_by_rows(stack, profile))
        before, after = slowdowns[-2:]
        at_speed = slowed_down(profile, {rows: mean((before[rows], after[rows])) for rows in after})
        simulated.append(_simulate(at_speed, policy, trace))
    everybody = [one for part in served for one in part]
    weights = [len(trace) for trace in traces]
    real = {
        "throughput_per_s": mean(throughput_per_s(part) for part in served),
        "mean_latency_s": mean(one.latency_s for one in everybody),
        "steps_skipped": sum(one.num_skipped for one in everybody)
        / sum(one.num_steps for one in everybody),
    }
    said = {
        "throughput_per_s": mean(one["throughput_per_s"] for one in simulated),
        "mean_latency_s": fmean((one["latency_s"]["mean"] for one in simulated), weights),
        "steps_skipped": fmean((one["steps_skipped"] for one in simulated), weights),
    }
    print(
        f"{policy} at {load}: mean latency {real['mean_latency_s']:.2f} s, "
        f"simulated {said['mean_latency_s']:.2f} s",
        flush=True,
    )
    return {
        "policy": policy,
        "load": load,
        "requests": len(everybody),
        "slowdowns": slowdowns,
        "real": real,
        "simulated": said,
        "throughput_error": _error(said, real, "throughput_per_s"),
        "mean_latency_error": _error(said, real, "mean_latency_s"),
    }


def _error(simulated: Mapping[str, float], real: Mapping[str, float], key: str) -> float:
    return abs(simulated[key] / real[key] - 1)
