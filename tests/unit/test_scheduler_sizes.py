"""Several sizes with knees of their own, and several models, side by side."""

from __future__ import annotations

import pytest
from scheduler_world import World, make_request

from services.scheduler.profile import DecodeTiming, Profile, SlotKind, SlotTiming
from services.scheduler.state import Stage
from shared import messages

KIND = SlotKind(unet_threads=2)


def two_knees(model: str = "m") -> Profile:
    """64x64 gains up to 32 rows, 128x128 only up to 2."""
    return Profile(
        model_id=model,
        device="cpu",
        dtype="float32",
        threads=2,
        slots=(
            SlotTiming(key="64x64", kind=KIND, step_ms={1: 10.0, 2: 11.0, 8: 14.0, 32: 20.0}),
            SlotTiming(key="128x128", kind=KIND, step_ms={1: 10.0, 2: 11.0, 8: 44.0, 32: 176.0}),
        ),
        decodes=(DecodeTiming(key="64x64", threads=2, chunk_ms=(5.0,) * 4),),
    )


@pytest.mark.parametrize("policy", ["synerdiff", "continuous-parallel"])
def test_a_size_with_a_small_knee_is_not_passed_for_ever_by_one_with_a_large(policy: str) -> None:
    world = World(policy=policy, profiles=(two_knees(),))
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    world.settle()
    profile = next(iter(world.core.unets.values())).profile
    assert (profile.knee("64x64"), profile.knee("128x128")) == (32, 2)
    for number in range(40):
        world.submit(make_request(f"small{number}", steps=2 + number % 5))
    world.submit(make_request("large", side=128, steps=3, priority=5))
    world.settle()
    next_number = 40
    for _ in range(40):
        # As many small ones come as are done, so there is always more than there is room for.
        while len(world.open_requests) < 40:
            world.submit(make_request(f"small{next_number}", steps=4, submitted_at=world.now))
            next_number += 1
        for name, unet in world.unets.items():
            if unet.slots:
                world.run_slot(name)
        for vae in world.vaes:
            for request_id in world.decodable(vae):
                world.decode(vae, request_id)
        world.settle()
        world.tick(0.01)
    assert world.final.get("large") == "done"


def test_room_is_counted_in_full_slots_of_each_request_s_own_size() -> None:
    world = World(policy="continuous-parallel", profiles=(two_knees(),))
    world.start_worker("unet", "unet-0")
    world.settle()
    for number in range(6):
        world.submit(make_request(f"large{number}", side=128, steps=9))
        world.submit(make_request(f"small{number}", steps=9))
    at_work = [one for one in world.core.requests.values() if one.stage is Stage.ENCODING]
    slots = sum(one.rows / (2 if one.batch_key.height == 128 else 32) for one in at_work)
    assert 2 <= slots < 3


def test_who_waits_for_another_model_is_not_counted() -> None:
    world = World(policy="synerdiff", profiles=(two_knees("m"), two_knees("n")))
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    world.start_worker("unet", "unet-1", model="n", group="other")
    world.start_worker("unet", "unet-2", model="n", group="third")
    world.settle()
    for number in range(30):
        world.submit(make_request(f"m{number}", side=128, steps=9))
    world.settle()
    num_waiting = world.core.count_stages()["waiting"]
    assert num_waiting > 20
    views = {}
    for name, unet in world.core.unets.items():
        world.core._dispatch.adjust_threshold(unet, world.now)
        views[name] = unet.threshold.stretches.unet
    assert [views[name] for name in views if world.unets[name].info.model_id == "n"] == [0.0, 0.0]
    (m,) = [views[name] for name in views if world.unets[name].info.model_id == "m"]
    # Of what is smoothed, a tenth of at least a rows' wait for each.
    assert m >= 0.1 * num_waiting


@pytest.mark.parametrize("side", [32, 64, 128])
def test_a_size_may_be_cut_into_more_or_fewer_chunks_than_a_worker_says(side: int) -> None:
    world = World(policy="synerdiff", profiles=(two_knees(),))
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    for number in range(3):
        world.submit(make_request(f"r{number}", side=side, steps=2))
    world.run_until_quiet()
    assert set(world.final.values()) == {"done"}
    assert world.now < 5
    assert not any(
        isinstance(getattr(one, "message", None), messages.CancelDecode)
        for _, _, commands in world.log
        for one in commands
    )


def test_models_on_one_device_are_all_served() -> None:
    world = World(policy="synerdiff", profiles=(two_knees("m"), two_knees("n")))
    for number, model in enumerate(["m", "n"]):
        world.start_worker("unet", f"unet-{number}", model=model)
        world.start_worker("vae", f"vae-{number}", model=model)
    world.settle()
    for number in range(20):
        world.submit(make_request(f"r{number}", steps=3, model="mn"[number % 2]))
    world.run_until_quiet()
    assert set(world.final.values()) == {"done"}
    assert world.now < 5
