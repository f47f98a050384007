"""What becomes of work that nobody answers for, told one case at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from scheduler_world import World, make_request

from services.scheduler.events import AttemptRefused
from services.scheduler.state import Stage
from shared import messages


def a_world(policy: str = "synerdiff", max_attempts: int = 50) -> World:
    world = World(policy=policy, max_attempts=max_attempts)
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    world.settle()
    for _ in range(60):
        # A new worker is measured first.
        world.tick()
        world.settle()
    return world


def only(names: Iterable[str]) -> str:
    (name,) = names
    return name


def start_second(world: World, kind: str) -> str:
    world.start_worker(kind, f"{kind}-1", group="other")
    world.settle()
    return next(name for name in [*world.unets, *world.vaes] if name.startswith(f"{kind}-1"))


def wait(world: World, seconds: float) -> None:
    for _ in range(int(seconds * 2)):
        world.tick(0.5)
        world.settle()


def run_slots(world: World, number: int) -> None:
    for _ in range(number):
        for name, unet in world.unets.items():
            if unet.slots and not unet.hangs:
                world.run_slot(name)
        world.settle()


def test_a_slot_that_is_never_answered_begins_again_elsewhere() -> None:
    world = a_world()
    world.submit(make_request("one", steps=5))
    world.settle()
    hung = only(world.unets)
    run_slots(world, 2)
    world.hang(hung)
    other = start_second(world, "unet")
    wait(world, 11)
    assert world.core.unets[hung].is_suspect
    assert not world.core.unets[hung].slots
    assert world.core.requests["one"].unet == other
    world.run_until_quiet()
    assert world.final == {"one": "done"}


def test_a_suspect_worker_gets_nothing_until_it_has_announced_what_it_holds() -> None:
    world = a_world()
    world.submit(make_request("one", steps=5))
    world.settle()
    hung = only(world.unets)
    world.hang(hung)
    wait(world, 11)
    world.submit(make_request("two", steps=2))
    wait(world, 30)
    assert {one.stage for one in world.core.requests.values()} == {Stage.WAITING}
    assert not any(
        isinstance(message, messages.AdmitRequest | messages.DenoiseSlot)
        for message in world.unets[hung].unread
    )
    world.go_on(hung)
    world.settle()
    assert not world.core.unets[hung].is_suspect
    world.run_until_quiet()
    assert world.final == {"one": "done", "two": "done"}
    assert not world.unets[hung].held


def test_a_decode_beside_a_hung_unet_worker_goes_on() -> None:
    world = a_world()
    world.submit(make_request("decode", steps=1))
    world.submit(make_request("long", steps=50))
    world.settle()
    hung = only(world.unets)
    run_slots(world, 1)
    world.hang(hung)
    wait(world, 11)
    for vae in world.vaes:
        for request_id in world.decodable(vae):
            world.decode(vae, request_id)
    world.settle()
    assert world.final == {"decode": "done"}


def test_a_decode_that_is_never_answered_goes_elsewhere_and_its_late_image_counts_once() -> None:
    world = a_world()
    world.submit(make_request("one", steps=1))
    world.settle()
    run_slots(world, 1)
    hung = only(world.vaes)
    world.hang(hung)
    other = start_second(world, "vae")
    wait(world, 11)
    assert world.core.requests["one"].vae == other
    world.go_on(hung)
    world.run_until_quiet()
    assert world.final == {"one": "done"}
    assert not world.core.vaes[hung].is_suspect


@pytest.mark.parametrize(
    "kind",
    [
        messages.AdmitRequest,
        messages.DenoiseSlot,
        messages.DecodeLatents,
        messages.GrantChunks,
    ],
)
def test_a_message_that_never_arrives_costs_time_and_nothing_else(
    kind: type[messages.Message],
) -> None:
    world = a_world()
    world.lose_next(kind)
    for number in range(3):
        world.submit(make_request(f"r{number}", steps=3))
    began_at = world.now
    world.run_until_quiet()
    assert set(world.final.values()) == {"done"}
    assert world.now - began_at < 60


def test_an_admission_that_is_lost_begins_again_though_its_worker_goes_on() -> None:
    world = a_world()
    world.submit(make_request("busy", steps=10_000))
    world.settle()
    world.lose_next(messages.AdmitRequest)
    world.submit(make_request("lost", steps=2))
    for _ in range(60):
        run_slots(world, 2)
        world.tick(0.5)
    assert not world.core.unets[only(world.unets)].is_suspect
    assert len(world.attempts["lost"]) == 2
    assert world.core.requests["busy"].num_attempts == 1


def test_a_size_that_is_run_for_the_first_time_may_take_longer() -> None:
    world = a_world()
    world.submit(make_request("rare", side=128, steps=2))
    world.settle()
    hung = only(world.unets)
    world.hang(hung)
    wait(world, 30)
    assert not world.core.unets[hung].is_suspect
    wait(world, 31)
    assert world.core.unets[hung].is_suspect


def test_latents_that_are_not_handed_over_are_denoised_again() -> None:
    world = a_world()
    world.submit(make_request("one", steps=1))
    world.settle()
    unet = only(world.unets)
    world.run_slot(unet)
    lost = [one for one in world.mail if isinstance(one, messages.LatentsFinished)]
    world.mail = type(world.mail)(one for one in world.mail if one not in lost)
    world.settle()
    wait(world, 11)
    assert world.core.requests["one"].num_attempts == 2
    world.run_until_quiet()
    assert world.final == {"one": "done"}


def test_a_decode_that_no_worker_gets_done_fails_in_the_end() -> None:
    world = a_world(max_attempts=3)
    world.submit(make_request("one", steps=1))
    world.settle()
    run_slots(world, 1)
    for _ in range(40):
        for vae in world.vaes.values():
            for decode in vae.decodes.values():
                decode.granted = 0
        wait(world, 6)
    assert world.failures == {"one": "too_many_attempts"}


def test_a_worker_that_lapsed_and_comes_back_drops_what_others_have_taken_over() -> None:
    world = a_world()
    world.submit(make_request("one", steps=8))
    world.settle()
    back = only(world.unets)
    run_slots(world, 3)
    world.lapse(back)
    other = start_second(world, "unet")
    assert world.core.requests["one"].unet == other
    assert world.unets[back].held
    world.come_back(back)
    world.settle()
    assert not world.unets[back].held
    assert not world.unets[back].slots
    world.run_until_quiet()
    assert world.final == {"one": "done"}


def test_a_late_failure_of_whoever_lost_a_request_is_not_the_request_s() -> None:
    world = a_world()
    world.submit(make_request("one", steps=1))
    world.settle()
    run_slots(world, 1)
    hung = only(world.vaes)
    world.hang(hung)
    start_second(world, "vae")
    wait(world, 11)
    attempt = world.core.requests["one"].attempt
    world.feed(
        messages.RequestFailed(
            incarnation=hung, request_id="one", attempt=attempt, code="late", reason="late"
        )
    )
    world.run_until_quiet()
    assert world.final == {"one": "done"}


def test_a_request_whose_attempt_was_refused_is_dropped() -> None:
    world = a_world()
    world.submit(make_request("one", steps=8))
    attempt = world.core.requests["one"].attempt
    world.feed(AttemptRefused(request_id="one", attempt="another"))
    assert "one" in world.core.requests
    world.feed(AttemptRefused(request_id="one", attempt=attempt))
    assert "one" not in world.core.requests
    world.settle()
    assert not world.unets[only(world.unets)].held


def test_a_decode_whose_commit_was_refused_does_not_hang() -> None:
    world = a_world()
    world.submit(make_request("one", steps=1))
    world.settle()
    run_slots(world, 1)
    vae = only(world.vaes)
    real = world.attempts["one"][-1]
    world.attempts["one"].append("of somebody else")
    world.decode(vae, "one")
    world.settle()
    assert world.core.requests["one"].attempt != real
    world.run_until_quiet()
    assert world.final == {"one": "done"}


def forgetful(world: World) -> None:
    world.restart_scheduler()
    world.settle()


def the_same(_: World) -> None:
    pass


def skips_and_warnings(between: Callable[[World], None]) -> tuple[int, int, tuple[str, ...]]:
    world = a_world("continuous-parallel-with-skip")
    for number in range(4):
        world.submit(make_request(f"r{number}", steps=12, guidance_skip="fast"))
    world.settle()
    run_slots(world, 6)
    for unet in world.unets.values():
        unet.slots.clear()
    between(world)
    request = world.core.requests["r0"]
    return request.num_skipped, request.last_full, request.warnings


def test_a_restarted_scheduler_remembers_warnings_and_the_skips_that_are_spent() -> None:
    known = skips_and_warnings(the_same)
    num_skipped, last_full, warnings = skips_and_warnings(forgetful)
    assert known[0] > 0
    assert warnings
    assert (num_skipped, warnings) == (known[0], known[2])
    assert last_full >= 0


def test_a_restarted_scheduler_knows_the_warnings_of_latents_that_wait() -> None:
    world = World(policy="synerdiff")
    world.start_worker("unet", "unet-0")
    world.submit(make_request("one", steps=1))
    world.settle()
    run_slots(world, 1)
    world.restart_scheduler()
    world.settle()
    request = world.core.requests["one"]
    assert request.stage is Stage.LATENTS
    assert request.warnings
