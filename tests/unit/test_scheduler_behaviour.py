"""What the scheduler's core promises, told one case at a time."""

from __future__ import annotations

from collections import Counter

import pytest
from scheduler_world import World, make_request

from services.scheduler.core.state import Stage
from shared import messages


@pytest.fixture(params=["continuous-serial", "continuous-parallel"])
def world(request: pytest.FixtureRequest) -> World:
    world = World(policy=request.param)
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    world.settle()
    return world


def only_unet(world: World) -> str:
    return next(iter(world.unets))


def test_a_new_request_is_in_a_forward_at_the_latest_in_the_third_slot(world: World) -> None:
    world.submit(make_request("long", steps=20))
    world.settle()
    unet = only_unet(world)
    for _ in range(3):
        world.run_slot(unet)
        world.settle()
    world.submit(make_request("late", steps=5))
    world.settle()
    assert world.core.requests["late"].stage is Stage.DENOISING
    slots_run = 0
    while not any(name == "late" for name, _, _ in world.ran):
        world.run_slot(unet)
        world.settle()
        slots_run += 1
    assert slots_run <= 3


def test_slots_are_filled_to_the_knee_oldest_first(world: World) -> None:
    for number in range(6):
        world.submit(make_request(f"r{number}", steps=9, submitted_at=float(number)))
    world.settle()
    unet = only_unet(world)
    for _ in range(2):
        world.run_slot(unet)
        world.settle()
    knee = world.core.unets[unet].profile.knee("64x64")
    slot = world.unets[unet].slots[-1]
    assert [row.request_id for row in slot.rows] == [f"r{n}" for n in range(knee // 2)]


def test_sizes_share_the_device_by_time_not_by_slots(world: World) -> None:
    for number in range(2):
        world.submit(make_request(f"small{number}", steps=60))
        world.submit(make_request(f"large{number}", steps=60, side=128))
    world.settle()
    name = only_unet(world)
    durations = world.core.unets[name].durations
    served_ms: Counter[str] = Counter()
    for _ in range(50):
        rows = world.unets[name].slots[0].rows
        (size,) = {row.request_id[:5] for row in rows}
        key = world.core.requests[rows[0].request_id].batch_key
        served_ms[size] += durations.alone(key.size, 2 * len(rows)).ms
        world.run_slot(name)
        world.settle()
    largest_ms = durations.alone("128x128", 4).ms
    assert abs(served_ms["small"] - served_ms["large"]) <= largest_ms


def test_a_serial_policy_never_runs_a_slot_beside_a_decode() -> None:
    world = World(policy="continuous-serial")
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    for number in range(4):
        world.submit(make_request(f"r{number}", steps=number + 1))
    for _ in range(200):
        world.settle()
        granted = [name for vae in world.vaes for name in world.decodable(vae)]
        queued = [name for name, unet in world.unets.items() if unet.slots]
        assert not (granted and queued)
        if granted:
            world.decode(next(iter(world.vaes)), granted[0])
        elif queued:
            world.run_slot(queued[0])
    assert set(world.final.values()) == {"done"}


def test_a_cancelled_request_frees_its_rows_at_once(world: World) -> None:
    world.submit(make_request("gone", steps=20))
    world.settle()
    unet = only_unet(world)
    world.run_slot(unet)
    world.settle()
    world.cancel("gone")
    world.settle()
    assert not world.unets[unet].held
    assert "gone" not in world.core.requests


def test_a_restarted_scheduler_goes_on_at_the_step_where_a_request_is(world: World) -> None:
    world.submit(make_request("kept", steps=6))
    world.settle()
    unet = only_unet(world)
    for _ in range(3):
        world.run_slot(unet)
        world.settle()
    world.restart_scheduler()
    world.run_until_quiet()
    assert world.final["kept"] == "done"
    assert len(world.attempts["kept"]) == 1


def test_a_request_of_a_lost_worker_begins_again_elsewhere(world: World) -> None:
    world.submit(make_request("moved", steps=6))
    world.settle()
    world.run_slot(only_unet(world))
    world.kill_worker(only_unet(world))
    world.start_worker("unet", "unet-1")
    world.run_until_quiet()
    assert world.final["moved"] == "done"
    assert len(world.attempts["moved"]) == 2


def test_two_unet_workers_share_the_requests(world: World) -> None:
    world.start_worker("unet", "unet-1")
    world.settle()
    for number in range(8):
        world.submit(make_request(f"r{number}", steps=5))
    world.settle()
    assert all(unet.slots for unet in world.unets.values())
    assert len(world.unets) == 2


def test_only_as_many_requests_become_resident_as_keep_a_worker_busy(world: World) -> None:
    for number in range(40):
        world.submit(make_request(f"r{number}", steps=5))
    world.settle()
    unet = world.core.unets[only_unet(world)]
    rows = sum(r.rows for r in world.core.requests.values() if r.stage is Stage.DENOISING)
    assert unet.profile.knee("64x64") <= rows <= 2 * unet.profile.knee("64x64") + 2


def test_one_failure_in_a_slot_leaves_the_others_running(world: World) -> None:
    world.submit(make_request("bad", steps=5))
    world.submit(make_request("good", steps=5))
    world.settle()
    unet = only_unet(world)
    slot = world.unets[unet].slots[0]
    attempt = world.attempts["bad"][-1]
    del world.unets[unet].held["bad"]
    world.run_slot(unet)
    report = world.mail.popleft()
    assert isinstance(report, messages.SlotDenoised)
    assert report.seq == slot.seq
    failure = messages.RowFailure(
        request_id="bad", attempt=attempt, code="not_finite", reason="the latents are not finite"
    )
    world.mail.append(
        messages.SlotDenoised(
            incarnation=report.incarnation,
            epoch=report.epoch,
            seq=report.seq,
            duration_ms=report.duration_ms,
            rows=report.rows,
            failures=(failure,),
        )
    )
    world.run_until_quiet()
    assert world.final == {"bad": "failed", "good": "done"}
