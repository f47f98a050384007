"""What a simulation has seen, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ThetaSample:
    """The threshold of a device group after a slot, and the stretches it was judged by."""

    at_s: float
    group: str
    theta: float
    unet_stretch: float
    vae_stretch: float


@dataclass(slots=True, kw_only=True)
class Course:
    """One request; instants in seconds of simulated time, negative while they have not come."""

    submitted_at: float
    denoised_at: float = -1.0
    finished_at: float = -1.0
    num_steps: int = 0
    num_skipped: int = 0
    failure: str = ""

    @property
    def is_finished(self) -> bool:
        """Return whether its picture is there."""
        return self.finished_at >= 0


@dataclass(slots=True, kw_only=True)
class SimulationLog:
    """Everything that the report is made from."""

    num_requests: int
    courses: dict[str, Course] = field(default_factory=dict)
    thetas: list[ThetaSample] = field(default_factory=list)
    num_slots: int = 0
    num_rows: int = 0
    num_final: int = 0
    ended_at: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Return whether every request is final."""
        return self.num_final >= self.num_requests

    def submitted(self, request_id: str, now: float) -> None:
        """Note that a request has come."""
        self.courses[request_id] = Course(submitted_at=now)

    def denoised(self, request_id: str, now: float, num_skipped: int, num_steps: int) -> None:
        """Note that its last step is done."""
        course = self.courses[request_id]
        course.denoised_at, course.num_skipped, course.num_steps = now, num_skipped, num_steps

    def finished(self, request_id: str, now: float) -> None:
        """Note that its picture is committed."""
        self.courses[request_id].finished_at = now
        self.num_final += 1

    def failed(self, request_id: str, code: str) -> None:
        """Note that it has failed."""
        self.courses[request_id].failure = code
        self.num_final += 1

    def slot(self, num_rows: int) -> None:
        """Note that a forward of so many rows begins."""
        self.num_slots += 1
        self.num_rows += num_rows

    def summary(self, *, duration_s: float | None = None) -> dict[str, Any]:
        """Return the figures: latencies in seconds, pictures a second until the last one.

        duration_s: of the arrivals; requests submitted in its last tenth or first tenth count as
        well: the trace is finite and all of it is served.
        """
        done = [course for course in self.courses.values() if course.is_finished]
        latencies = sorted(course.finished_at - course.submitted_at for course in done)
        decodes = sorted(course.finished_at - course.denoised_at for course in done)
        steps = sum(course.num_steps for course in done)
        skipped = sum(course.num_skipped for course in done)
        first = min((course.submitted_at for course in self.courses.values()), default=0.0)
        last = max((course.finished_at for course in done), default=0.0)
        return {
            "requests": self.num_requests,
            "finished": len(done),
            "failed": sum(bool(course.failure) for course in self.courses.values()),
            "arrivals_s": duration_s,
            "makespan_s": last - first,
            "throughput_per_s": len(done) / (last - first) if last > first else 0.0,
            "latency_s": describe(latencies),
            "decode_latency_s": describe(decodes),
            "steps_skipped": skipped / steps if steps else 0.0,
            "rows_per_slot": self.num_rows / self.num_slots if self.num_slots else 0.0,
            "theta_mean": mean(sample.theta for sample in self.thetas) if self.thetas else None,
        }


def describe(ordered: Sequence[float]) -> dict[str, float]:
    """Return mean, percentiles (nearest rank) and maximum of sorted samples; zeros where none."""
    if not ordered:
        return dict.fromkeys(("mean", "p50", "p95", "p99", "max"), 0.0)

    def rank(fraction: float) -> float:
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]

    return {
        "mean": mean(ordered),
        "p50": rank(0.5),
        "p95": rank(0.95),
        "p99": rank(0.99),
        "max": ordered[-1],
    }
