"""Decodes while many wait for the UNet, simulated."""

from __future__ import annotations

from services.scheduler.devices.profile_file import parse_profile
from services.scheduler.planning.policies import make_policy
from services.scheduler.simulation.arrivals import Mix, make_arrivals
from services.scheduler.simulation.simulator import Simulation, SimulationSettings
from shared.settings import SHIPPED_PROFILES


def test_decodes_do_not_pile_up_while_many_wait_for_the_unet() -> None:
    """What delays the UNet has a price, which must not be avoided by leaving decodes undone."""
    profile = parse_profile((SHIPPED_PROFILES / "assumed" / "a100-sd15.json").read_text())
    backlog = make_arrivals("backlog", rate=60, duration_s=1, mix=Mix(), seed=0)
    simulation = Simulation(profile, make_policy("synerdiff"), backlog, SimulationSettings())
    figures = simulation.run().summary()
    assert figures["finished"] == len(backlog)
    alone_s = profile.decodes[0].chunk_ms[0] * len(profile.decodes[0].chunk_ms) / 1000
    assert figures["decode_latency_s"]["max"] < 30 * alone_s
