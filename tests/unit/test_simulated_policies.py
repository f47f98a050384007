"""The policies benchmark on the simulator: the same cells, without any worker."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.contenders import SYNERDIFF
from bench.plan import PROFILE
from bench.policies_cells import Cell, Plan
from bench.policies_measure import Sample, measure
from bench.simulated_stack import SimulatedStack
from services.scheduler.devices.profile_file import parse_profile
from services.scheduler.simulation.arrivals import Mix, make_arrivals


def test_a_capacity_is_a_load_at_which_latencies_stay_near_the_unloaded_ones() -> None:
    plan = Plan(
        seeds=(0,),
        contenders=(SYNERDIFF,),
        num_requests=24,
        num_in_backlog=16,
        num_unloaded=6,
        mix=Mix(num_steps=(4, 6, 8)),
    )
    profile = parse_profile(PROFILE.read_text())
    stack = SimulatedStack(profile)
    samples: dict[str, Sample] = {}
    for kind in ("throughput", "unloaded", "capacity"):
        cell = Cell(kind=kind, seed=0, contender=SYNERDIFF.name)
        samples[cell.name] = measure(stack, cell, plan, samples, profile)
    throughput, unloaded, capacity = samples.values()
    assert throughput["slowdown"] == 1.0
    assert 0 < capacity["capacity_per_s"] <= throughput["throughput_per_s"]
    tried = {run["load_per_s"]: run for run in capacity["tried"]}
    carried = tried[capacity["capacity_per_s"]]
    assert carried["p95_s"] <= capacity["limit_s"]
    assert not any(run["is_carried"] for load, run in tried.items() if load > carried["load_per_s"])
    assert capacity["limit_s"] == 3 * unloaded["p95_s"]


@pytest.mark.parametrize("policy", ["synerdiff", "synerdiff-without-planning"])
def test_a_profile_in_which_chunks_make_slots_faster_is_served_by(policy: str) -> None:
    """Measured profiles are noisy: then running out of chunks must not leave a slot no option."""
    measured = parse_profile(PROFILE.read_text())
    slots = [
        replace(slot, step_ms={rows: 0.5 * ms for rows, ms in slot.step_ms.items()})
        if slot.kind.chunks
        else slot
        for slot in measured.slots
    ]
    stack = SimulatedStack(replace(measured, slots=tuple(slots)))
    stack.serve_by(policy)
    arrivals = make_arrivals("poisson", rate=2.5, duration_s=20, mix=Mix(num_steps=(4, 8)), seed=1)
    assert len(stack.play(arrivals)) == len(arrivals)
