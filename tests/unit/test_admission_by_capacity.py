"""The gateway's admission by the capacity that the scheduler's core tells, on the simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_backend import MODEL
from image_parameters import PARAMETERS

from bench.plan import PROFILE
from services.gateway.admission import (
    Ledger,
    WaitLimits,
    check_admission,
    order_work_s,
    read_capacities,
    wait_s,
)
from services.gateway.order import ImageOrder
from services.scheduler.policies import make_policy
from services.scheduler.profile_file import parse_profile
from services.scheduler.simulation.arrivals import Mix, make_arrivals
from services.scheduler.simulation.log import SimulationLog
from services.scheduler.simulation.simulator import Simulation, SimulationSettings
from shared import codec
from shared.errors import OverloadedError

TIMEOUT_S = 15.0
LIMITS = WaitLimits(max_wait_s=TIMEOUT_S / 2, timeout_s=TIMEOUT_S)
LOAD_S = 20.0
MIX = Mix(num_steps=(25,), guidance_scales=(5.0,))
PROFILED = parse_profile(PROFILE.read_text())
MODEL_INFO = replace(
    MODEL,
    model_id=PROFILED.model_id,
    default_height=PARAMETERS.height,
    default_width=PARAMETERS.width,
)
ORDER = ImageOrder(
    model=MODEL_INFO,
    images=(replace(PARAMETERS, num_inference_steps=25),),
    response_format="b64_json",
    is_streamed=False,
    priority=0,
    deadline_ms=0,
    quality="high",
    warnings=(),
)


class GuardedSimulation(Simulation):
    """Arrivals pass the gateway's admission, which hears of the capacity twice a second."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._ledger = Ledger()
        self._told: dict[str, Any] = {}
        self._written_at = 0.0

    def _tick(self) -> None:
        super()._tick()
        self._written_at = self._world.clock.now
        self._told = codec.decode_value(codec.encode_value(self._core.capacity()), dict)

    def _arrive(self, request_id: str) -> None:
        now = self._world.clock.now
        capacity = read_capacities(self._told).get(PROFILED.model_id)
        if capacity is not None:
            work_s = order_work_s(ORDER, capacity)
            accepted = self._ledger.since(PROFILED.model_id, self._written_at)
            start_s = wait_s(capacity, self._written_at, accepted, now)
            try:
                check_admission(start_s=start_s, work_s=work_s, deadline_ms=0, limits=LIMITS)
            except OverloadedError:
                self._world.log.submitted(request_id, now)
                self._world.log.failed(request_id, "overloaded")
                return
            self._ledger.confirm(self._ledger.add(PROFILED.model_id, work_s, now), now)
        super()._arrive(request_id)


def serve(rate: float, kind: type[Simulation], slot_overhead_ms: float) -> SimulationLog:
    arrivals = make_arrivals("poisson", rate=rate, duration_s=LOAD_S, mix=MIX, seed=1)
    settings = SimulationSettings(slot_overhead_ms=slot_overhead_ms)
    return kind(PROFILED, make_policy("synerdiff"), arrivals, settings).run()


@pytest.mark.parametrize("slot_overhead_ms", [1.5, 100.0], ids=["as profiled", "slower"])
def test_five_times_the_load_is_answered_in_time_or_refused(slot_overhead_ms: float) -> None:
    alone = serve(5.0, Simulation, slot_overhead_ms).summary()
    capacity_per_s = alone["throughput_per_s"]
    log = serve(5 * capacity_per_s, GuardedSimulation, slot_overhead_ms)
    done = [course for course in log.courses.values() if course.is_finished]
    refused = [course for course in log.courses.values() if course.failure == "overloaded"]
    latencies = [course.finished_at - course.submitted_at for course in done]
    in_time = sum(latency <= TIMEOUT_S for latency in latencies)
    assert len(done) + len(refused) == len(log.courses)
    assert in_time >= 0.8 * capacity_per_s * LOAD_S
    assert in_time >= 0.98 * len(done)
