"""What `bench.real_stack` does, done by the simulator against a profile."""

from __future__ import annotations

from collections.abc import Sequence

from bench.contenders import make_policy
from bench.real_stack import Served
from services.scheduler.devices.profile import Profile, SlotKind
from services.scheduler.planning.policy import Policy
from services.scheduler.simulation.arrivals import Arrival
from services.scheduler.simulation.simulator import Simulation, SimulationSettings


class SimulatedStack:
    """One device group, as far as the simulator goes."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._policy: Policy

    def serve_by(self, policy: str) -> None:
        """Serve by that policy from now on."""
        self._policy = make_policy(policy)

    def slot_ms(self, *, size: str, rows: int, threads: int) -> float:
        """As the profile says."""
        return self._profile.slot_ms(size, rows, SlotKind(unet_threads=threads))[0]

    def play(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Serve every request at its time."""
        simulation = Simulation(self._profile, self._policy, arrivals, SimulationSettings())
        courses = simulation.run().courses.values()
        return [
            Served(
                submitted_s=course.submitted_at,
                finished_s=course.finished_at,
                num_steps=arrival.num_steps,
                is_guided=arrival.guidance_scale > 1,
                num_skipped=course.num_skipped,
            )
            for course, arrival in zip(courses, arrivals, strict=True)
        ]

    def play_within(
        self, arrivals: Sequence[Arrival], *, limit_s: float, max_late: int
    ) -> list[Served] | None:
        """The same; None if more than `max_late` requests took more than `limit_s`."""
        served = self.play(arrivals)
        num_late = sum(one.latency_s > limit_s for one in served)
        return served if num_late <= max_late else None
