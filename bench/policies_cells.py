"""The list of what `bench policies` measures; later cells depend on what earlier ones found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from bench.contenders import ALL, EQUAL_SKIP, NAIVE, SYNERDIFF, TUNED, WITHOUT, Contender
from services.scheduler.simulation.arrivals import Mix

Samples = Mapping[str, Mapping[str, Any]]
Kind = Literal["throughput", "standing", "unloaded", "capacity", "latency"]
_TO_CAPACITY: tuple[Kind, ...] = ("unloaded", "capacity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    num_requests: of a trace. num_in_backlog: that stand at once for the throughput. num_standing:
    the same for what is attained of the ceiling: so many that their end, when slots get smaller,
    hardly counts; 0 makes do with the throughput. num_unloaded: served one after the other.
    has_loads: capacities and latencies at loads are measured; without, latencies are those of the
    backlog.
    """

    seeds: tuple[int, ...]
    contenders: tuple[Contender, ...] = ALL
    num_requests: int
    num_in_backlog: int
    num_standing: int = 0
    num_unloaded: int = 20
    has_loads: bool = True
    mix: Mix = field(default_factory=Mix)

    @classmethod
    def full(cls, seed: int, *, num_seeds: int, num_requests: int) -> Plan:
        """Every contender, several seeds."""
        seeds = tuple(range(seed, seed + num_seeds))
        return cls(seeds=seeds, num_requests=num_requests, num_in_backlog=120, num_standing=480)

    @classmethod
    def quick(cls, seed: int) -> Plan:
        """The usual design as people run it, tuned, and skipping, against synerdiff."""
        return cls(
            seeds=(seed,),
            contenders=(NAIVE, TUNED[-1], EQUAL_SKIP[-1], SYNERDIFF),
            num_requests=0,
            num_in_backlog=48,
            has_loads=False,
            mix=Mix(num_steps=(4, 6, 8)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement. against: the baseline that sets the load, for latencies."""

    kind: Kind
    seed: int
    contender: str
    against: str = ""

    @property
    def name(self) -> str:
        """Its key among the samples."""
        at = f" at the load of {self.against}" if self.against else ""
        return f"{self.kind}/{self.seed}/{self.contender}{at}"

    def load(self, samples: Samples) -> float:
        """Requests a second, of a latency cell: 0.9 of the baseline's capacity.

        Of the naive one all that it can just carry: the least of its throughputs, which differ by
        up to a half from moment to moment. What is more than it can serve would make it as late as
        the trace is long.
        """
        if self.against == NAIVE.name:
            return min(throughputs(NAIVE, samples))
        first = min(int(name.split("/")[1]) for name in samples if name.startswith("capacity/"))
        return 0.9 * float(samples[f"capacity/{first}/{self.against}"]["capacity_per_s"])


def best_of(contenders: Sequence[Contender], plan: Plan, samples: Samples) -> Contender:
    """The one with the highest capacity, of those that take part; by throughput without loads."""
    taking_part = [one for one in contenders if one in plan.contenders]

    def order(one: Contender) -> tuple[float, float]:
        capacity = samples.get(f"capacity/{plan.seeds[0]}/{one.name}", {"capacity_per_s": 0.0})
        return float(capacity["capacity_per_s"]), throughput(one, samples)

    return max(taking_part, key=order)


def throughput(contender: Contender, samples: Samples) -> float:
    """The median over the seeds that were measured, in pictures a second; 0 if none was."""
    found = throughputs(contender, samples)
    return median(found) if found else 0.0


def throughputs(contender: Contender, samples: Samples) -> list[float]:
    """Of each seed that was measured, in pictures a second."""
    return [
        float(sample["throughput_per_s"])
        for name, sample in samples.items()
        if name.startswith("throughput/") and name.split("/", 2)[2] == contender.name
    ]


def next_cells(plan: Plan, samples: Samples, *, only_missing: bool) -> list[Cell]:
    """The cells known so far, in the order of measuring."""
    cells = [
        Cell(kind="throughput", seed=seed, contender=one.name)
        for seed in plan.seeds
        for one in plan.contenders
    ]
    if plan.num_standing:
        cells += [Cell(kind="standing", seed=seed, contender=SYNERDIFF.name) for seed in plan.seeds]
    if plan.has_loads and all(cell.name in samples for cell in cells):
        cells += _cells_at_loads(plan, samples)
    return [cell for cell in cells if not only_missing or cell.name not in samples]


def _cells_at_loads(plan: Plan, samples: Samples) -> list[Cell]:
    """Those whose load hangs on a capacity come once all of these are known."""
    known = _latencies((NAIVE,), plan)
    known += _capacities([one for one in plan.contenders if one not in WITHOUT], plan)
    if any(cell.name not in samples for cell in known):
        return known
    best = best_of(TUNED, plan, samples)
    latencies = _latencies((best, best_of(EQUAL_SKIP, plan, samples)), plan)
    without_parts = [
        Cell(kind="latency", seed=plan.seeds[0], contender=one.name, against=best.name)
        for one in WITHOUT
    ]
    return known + latencies + without_parts


def _latencies(baselines: Sequence[Contender], plan: Plan) -> list[Cell]:
    """Each baseline's and synerdiff's at the baseline's load, in turns."""
    return [
        Cell(kind="latency", seed=seed, contender=one.name, against=baseline.name)
        for seed in plan.seeds
        for baseline in baselines
        for one in (baseline, SYNERDIFF)
    ]


def _capacities(contenders: Sequence[Contender], plan: Plan) -> list[Cell]:
    """Of the first seed: everybody's unloaded latencies, by which capacities are measured then."""
    return [
        Cell(kind=kind, seed=plan.seeds[0], contender=one.name)
        for kind in _TO_CAPACITY
        for one in contenders
    ]
