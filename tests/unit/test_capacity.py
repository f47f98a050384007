"""What the scheduler says of the work ahead, against what it then takes."""

from __future__ import annotations

import pytest
from scheduler_world import World, make_request

from services.scheduler.capacity import Capacity


def a_world() -> World:
    world = World(policy="continuous-parallel")
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    world.settle()
    return world


def capacity(world: World) -> Capacity:
    return world.core.capacity()["m"]


def serve(world: World, slot_s: float) -> float:
    """Run slots and decodes, each slot so long; return when all is done."""
    while world.open_requests:
        for name, unet in world.unets.items():
            if unet.slots:
                world.run_slot(name)
        world.now += slot_s
        world.settle()
        for vae in world.vaes:
            for request_id in world.decodable(vae):
                world.decode(vae, request_id)
        world.tick(0.0)
        world.settle()
    return world.now


def submit(world: World, number: int, first: int = 0) -> None:
    for i in range(first, first + number):
        world.submit(make_request(f"r{i}", steps=20, submitted_at=world.now))
    world.settle()


def test_nothing_is_ahead_of_an_idle_service_and_each_request_adds_its_own() -> None:
    world = a_world()
    idle = capacity(world)
    assert idle.backlog_ms == 0
    for number in (1, 2, 30):
        other = a_world()
        submit(other, number)
        one = 20 * 2 * idle.row_ms + idle.decode_ms + idle.overhead_ms
        assert capacity(other).backlog_ms == pytest.approx(number * one, rel=0.05)


@pytest.mark.parametrize("slowness", [0.5, 1.0, 3.0])
def test_the_backlog_follows_from_what_serving_really_takes(slowness: float) -> None:
    world = a_world()
    unet = next(iter(world.core.unets.values()))
    knee = unet.profile.knee("64x64")
    slot_s = slowness * unet.durations.alone("64x64", knee).ms / 1000
    submit(world, 120)
    serve(world, slot_s)
    submit(world, 60, first=120)
    predicted_s = capacity(world).backlog_ms / 1000
    began_at = world.now
    taken_s = serve(world, slot_s) - began_at
    assert predicted_s == pytest.approx(taken_s, rel=0.25)


def test_a_model_without_workers_of_both_kinds_has_no_capacity() -> None:
    world = World()
    world.start_worker("unet", "unet-0")
    world.settle()
    assert world.core.capacity() == {}


def test_another_worker_halves_what_is_ahead() -> None:
    world = a_world()
    submit(world, 30)
    before = capacity(world)
    world.start_worker("unet", "unet-1", group="other")
    world.start_worker("vae", "vae-1", group="other")
    world.settle()
    assert capacity(world).backlog_ms == pytest.approx(before.backlog_ms / 2, rel=0.1)
    assert capacity(world).row_ms == pytest.approx(before.row_ms / 2)
