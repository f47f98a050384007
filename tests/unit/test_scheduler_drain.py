"""A worker that drains gets nothing new, and what it hands back goes on where it was."""

from __future__ import annotations

import pytest
from scheduler_world import World, make_request

from services.scheduler.core.state import Stage
from shared import messages


@pytest.fixture
def world() -> World:
    world = World()
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    world.settle()
    return world


def denoise(world: World, unet: str, num_slots: int) -> None:
    for _ in range(num_slots):
        world.settle()
        world.run_slot(unet)
    world.settle()


def test_a_request_goes_on_elsewhere_at_the_step_where_it_was_in_the_same_attempt(
    world: World,
) -> None:
    (old,) = world.unets
    world.submit(make_request("r", steps=6))
    denoise(world, old, 3)
    attempt = world.core.requests["r"].attempt
    world.start_worker("unet", "unet-1")
    world.drain_worker(old)
    world.settle()
    request = world.core.requests["r"]
    assert request.stage is Stage.DENOISING
    assert request.unet != old
    assert request.attempt == attempt
    assert request.done_step == 3
    world.run_until_quiet()
    assert world.final == {"r": "done"}
    # The world fails a step that runs twice in an attempt; here no second one was needed.
    assert world.attempts["r"] == [attempt]
    assert old not in world.unets


def test_it_waits_for_a_worker_where_there_is_no_other(world: World) -> None:
    (old,) = world.unets
    world.submit(make_request("r", steps=6))
    denoise(world, old, 2)
    world.drain_worker(old)
    world.settle()
    assert world.core.requests["r"].stage is Stage.WAITING
    assert old not in world.unets
    world.start_worker("unet", "unet-0")
    world.run_until_quiet()
    assert world.final == {"r": "done"}
    assert len(world.attempts["r"]) == 1


def test_a_scheduler_s_restart_in_between_loses_no_step(world: World) -> None:
    (old,) = world.unets
    world.submit(make_request("r", steps=6))
    denoise(world, old, 2)
    world.drain_worker(old)
    world.settle()
    world.restart_scheduler()
    world.start_worker("unet", "unet-0")
    world.run_until_quiet()
    assert world.final == {"r": "done"}
    assert len(world.attempts["r"]) == 1


def test_a_sampler_whose_state_can_t_move_is_finished_where_it_is(world: World) -> None:
    (old,) = world.unets
    world.submit(make_request("r", steps=6, sampler="unmovable"))
    denoise(world, old, 2)
    world.start_worker("unet", "unet-1")
    world.drain_worker(old)
    world.settle()
    assert world.core.requests["r"].unet == old
    world.run_until_quiet()
    assert world.final == {"r": "done"}
    assert len(world.attempts["r"]) == 1
    assert old not in world.unets


def test_a_worker_that_drains_gets_nothing_new_and_is_told_so(world: World) -> None:
    (old,) = world.unets
    (vae,) = world.vaes
    for name in (old, vae):
        world.drain_worker(name)
        world.settle()
    assert not world.unets  # they held nothing, and left once they were told
    assert not world.vaes
    world.submit(make_request("r"))
    assert world.core.requests["r"].stage is Stage.WAITING


def test_a_new_scheduler_learns_who_is_leaving(world: World) -> None:
    (old,) = world.unets
    world.submit(make_request("r", steps=6, sampler="unmovable"))
    denoise(world, old, 2)
    world.drain_worker(old)
    world.restart_scheduler()
    world.settle()
    assert world.core.unets[old].is_draining


def test_a_vae_worker_finishes_its_decodes_before_it_leaves(world: World) -> None:
    (unet,) = world.unets
    (vae,) = world.vaes
    world.submit(make_request("r", steps=1))
    denoise(world, unet, 1)
    assert world.core.requests["r"].stage is Stage.DECODING
    world.drain_worker(vae)
    world.settle()
    assert vae in world.vaes
    world.run_until_quiet()
    assert world.final == {"r": "done"}
    assert vae not in world.vaes


def test_what_was_handed_back_twice_or_late_changes_nothing(world: World) -> None:
    (old,) = world.unets
    world.submit(make_request("r", steps=6))
    denoise(world, old, 2)
    world.start_worker("unet", "unet-1")
    world.drain_worker(old)
    late = next(m for m in world.mail if isinstance(m, messages.RequestHandedBack))
    world.settle()
    before = world.core.requests["r"].unet
    world.feed(late)
    assert world.core.requests["r"].unet == before
    assert world.core.requests["r"].stage is Stage.DENOISING
    world.run_until_quiet()
    assert world.final == {"r": "done"}
