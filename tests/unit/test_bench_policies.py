"""What the policies benchmark measures, in which order, and what it compares with."""

from __future__ import annotations

import pytest

from bench.ceiling import ceiling_s
from bench.contenders import NAIVE, SYNERDIFF, TUNED
from bench.policies_cells import Plan, best_of, next_cells
from bench.policies_report import summarise
from services.scheduler.devices.profile import DecodeTiming, Profile, SlotKind, SlotTiming


def a_profile(*, beside_ms: float) -> Profile:
    return Profile(
        model_id="m",
        device="cpu",
        dtype="float32",
        threads=2,
        slots=(
            SlotTiming(key="64x64", kind=SlotKind(unet_threads=2), step_ms={2: 30.0, 4: 40.0}),
            SlotTiming(
                key="64x64",
                kind=SlotKind(unet_threads=1, vae_threads=1, chunks=2),
                step_ms={4: beside_ms},
                chunks_ms={4: beside_ms / 2},
            ),
        ),
        decodes=(DecodeTiming(key="64x64", threads=2, chunk_ms=(10.0, 10.0)),),
    )


def test_the_ceiling_takes_turns_where_overlap_gains_nothing() -> None:
    profile = a_profile(beside_ms=60.0)
    assert ceiling_s(profile, num_rows=4, num_decodes=1) == pytest.approx(0.060)
    assert ceiling_s(profile, num_rows=8, num_decodes=0) == pytest.approx(0.080)


def test_the_ceiling_overlaps_as_many_decodes_as_there_are() -> None:
    profile = a_profile(beside_ms=44.0)
    assert ceiling_s(profile, num_rows=4, num_decodes=1) == pytest.approx(0.044)
    assert ceiling_s(profile, num_rows=8, num_decodes=1) == pytest.approx(0.084)
    assert ceiling_s(profile, num_rows=4, num_decodes=2) == pytest.approx(0.048)


def all_throughputs(plan: Plan) -> dict[str, dict[str, float]]:
    cells = next_cells(plan, {}, only_missing=True)
    rates = {contender.name: 1.0 + i / 10 for i, contender in enumerate(plan.contenders)}
    return {
        cell.name: {
            "throughput_per_s": rates[cell.contender],
            "rows_per_picture": 10.0,
            "slowdown": 1.1,
            "mean_s": 1.0 / rates[cell.contender],
            "p99_s": 2.0 / rates[cell.contender],
        }
        for cell in cells
    }


def test_the_baseline_with_the_highest_capacity_sets_the_load() -> None:
    plan = Plan.full(0, num_seeds=2, num_requests=400)
    samples = all_throughputs(plan)
    assert len(samples) == 2 * (len(plan.contenders) + 1), "what is attained is measured apart"
    assert best_of(TUNED, plan, samples).name == "continuous-parallel"
    following = next_cells(plan, samples, only_missing=True)
    assert {cell.against for cell in following if cell.kind == "latency"} == {NAIVE.name}
    assert {cell.kind for cell in following} == {"latency", "unloaded", "capacity"}
    capacities = {cell.name: {"capacity_per_s": 2.0} for cell in following}
    capacities["capacity/0/dynamic"] = {"capacity_per_s": 2.5}
    best = best_of(TUNED, plan, samples | capacities)
    assert best.name == "dynamic"
    latencies = next_cells(plan, samples | capacities, only_missing=False)
    pairs = {(cell.contender, cell.against) for cell in latencies if cell.kind == "latency"}
    assert {(best.name, best.name), (SYNERDIFF.name, best.name)} < pairs
    loads = {cell.against: cell.load(samples | capacities) for cell in latencies if cell.against}
    assert loads[NAIVE.name] == samples[f"throughput/0/{NAIVE.name}"]["throughput_per_s"]
    assert loads[best.name] == pytest.approx(2.25)


def test_the_last_line_says_how_much_better_synerdiff_is_than_each_baseline() -> None:
    plan = Plan.quick(0)
    samples = all_throughputs(plan)
    line = summarise(plan, samples, a_profile(beside_ms=44.0))["line"]
    assert line["naive"]["name"] == NAIVE.name
    assert line["naive"]["throughput_ratio"] == pytest.approx(1.3)
    assert line["naive"]["mean_latency_reduction"] == pytest.approx(1 - 1 / 1.3, abs=1e-4)
    assert line["best"]["name"] == "continuous-parallel"
    ours = samples[f"throughput/0/{SYNERDIFF.name}"]["throughput_per_s"]
    least_s = ceiling_s(a_profile(beside_ms=44.0), num_rows=10.0, num_decodes=1)
    assert line["attained_over_ceiling"] == pytest.approx(ours * 1.1 * least_s, abs=1e-4)


def test_what_is_not_measured_yet_is_missing_and_not_guessed() -> None:
    plan = Plan.full(0, num_seeds=1, num_requests=400)
    report = summarise(plan, all_throughputs(plan), a_profile(beside_ms=44.0))
    assert report["line"]["best"]["mean_latency_reduction"] is None
    assert report["cells_missing"]
