"""A profile in short is completed beside requests that run already."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from scheduler_world import World, make_request, make_worker

from services.scheduler.core.calibration import MAX_HOLD_S, MAX_UNANSWERED, PAUSE_S
from services.scheduler.core.commands import KeepProfile, Send
from services.scheduler.devices.choice import matching_profile, profile_in_short
from services.scheduler.devices.measurements import (
    MAX_TOTAL_MS,
    Measured,
    complete_profile,
    list_measurements,
)
from services.scheduler.devices.profile import Profile, SlotKind
from shared import messages

UNET = make_worker("unet", "u", "u-1")
VAE = make_worker("vae", "v", "v-1")
SHORT = profile_in_short(UNET, [VAE])


def make_world(policy: str = "synerdiff") -> World:
    world = World(policy=policy)
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    return world


def deliver_until_measuring(world: World) -> messages.MeasureSlot:
    """Until both sides measure; their answers are in the mail."""
    while True:
        world.deliver()
        asked = last_commands(world)
        slots = [one for one in asked if isinstance(one, messages.MeasureSlot)]
        if slots and any(isinstance(one, messages.MeasureChunks) for one in asked):
            return slots[0]


def last_commands(world: World) -> list[messages.Message]:
    return [one.message for one in world.log[-1][2] if isinstance(one, Send)]


def num_turns(world: World) -> int:
    """Measurements begun."""
    numbers = {
        one.message.number
        for _, _, commands in world.log
        for one in commands
        if isinstance(one, Send)
        and isinstance(one.message, messages.MeasureSlot | messages.MeasureChunks)
    }
    return len(numbers)


def profile_of(world: World) -> Profile:
    (unet,) = world.core.unets.values()
    return unet.profile


# --- what is measured ---------------------------------------------------------------------------


def test_cores_are_split_on_a_cpu_and_nothing_is_on_any_other_device() -> None:
    on_cpu = list_measurements(SHORT, UNET, VAE)
    splits = {(one.unet_threads, one.vae_threads) for one in on_cpu if one.rows and one.vae_threads}
    assert splits == {(1, 1)}
    on_gpu = list_measurements(replace(SHORT, device="cuda"), UNET, VAE)
    assert {one.unet_threads for one in on_gpu if one.rows} == {2}
    assert {one.vae_threads for one in on_gpu} == {0, 2}


@pytest.mark.parametrize("threads", [1, 2, 4, 16, 64])
def test_no_side_gets_more_threads_than_there_are(threads: int) -> None:
    unet, vae = replace(UNET, threads=threads), replace(VAE, threads=threads)
    listed = list_measurements(profile_in_short(unet, [vae]), unet, vae)
    assert any(one.rows and one.vae_threads for one in listed)
    for one in listed:
        assert one.unet_threads + one.vae_threads <= max(threads, 2)


@pytest.mark.parametrize("factor", [1.0, 10.0, 20.0, 1_000.0])
def test_a_slow_model_is_measured_in_fewer_rows_or_not_at_all(factor: float) -> None:
    unet = replace(UNET, step_ms={rows: ms * factor for rows, ms in UNET.step_ms.items()})
    listed = list_measurements(profile_in_short(unet, [VAE]), unet, VAE)
    assert sum(one.window_ms for one in listed) <= MAX_TOTAL_MS
    assert bool(listed) == (factor < 1_000)
    assert len(listed) <= len(list_measurements(SHORT, UNET, VAE))


def test_a_slot_is_slowed_while_chunks_run_and_no_longer() -> None:
    found = {
        one: Measured(
            step_ms=(15.0 if one.vae_threads else 10.0) * one.rows if one.rows else 0.0,
            chunk_ms=(6.0,) * 4 if one.vae_threads else (),
        )
        for one in list_measurements(SHORT, UNET, VAE)
    }
    profile = complete_profile(SHORT, found, made_with="u-1")
    assert profile
    assert profile.source == "calibrated"
    of = {kind.chunks: kind for kind in profile.beside_kinds("64x64")}
    assert set(of) == {1, 2, 4, 8}
    # Two rows: 20 ms alone, 30 ms beside. In 6 ms of company a fifth of the slot is done.
    assert profile.slot_ms("64x64", 2, of[1]) == pytest.approx((6 + 0.8 * 20, 6))
    assert profile.slot_ms("64x64", 2, of[4]) == pytest.approx((24 + 0.2 * 20, 24))
    assert profile.slot_ms("64x64", 2, of[8]) == pytest.approx((30, 48))
    assert profile.slot_ms("64x64", 2, SlotKind(unet_threads=2)) == (20, 0)


def test_a_profile_fits_the_worker_that_it_was_made_with_however_noisy_its_start_was() -> None:
    noisy = replace(UNET, step_ms={rows: 10 * ms for rows, ms in UNET.step_ms.items()})
    found = {
        one: Measured(step_ms=10.0 * one.rows, chunk_ms=(6.0,) * 4)
        for one in list_measurements(SHORT, UNET, VAE)
    }
    profile = complete_profile(SHORT, found, made_with=noisy.incarnation)
    assert profile
    assert matching_profile([profile], noisy) is profile
    assert matching_profile([profile], replace(noisy, incarnation="u-2")) is None


def test_what_could_not_be_measured_is_left_out() -> None:
    listed = list_measurements(SHORT, UNET, VAE)
    found = {
        one: Measured(step_ms=0.0 if one.rows > 4 else 9.0 * one.rows, chunk_ms=(6.0,) * 4)
        for one in listed
    }
    profile = complete_profile(SHORT, found, made_with="u-1")
    assert profile
    assert all(max(slot.step_ms) <= 4 for slot in profile.slots)
    assert complete_profile(SHORT, dict.fromkeys(listed, Measured()), made_with="u-1") is None


# --- when ---------------------------------------------------------------------------------------


def test_idle_workers_are_measured_at_once_and_their_profile_is_kept() -> None:
    world = make_world()
    assert world.now == 0.0
    world.settle()
    assert profile_of(world).source == "calibrated"
    assert profile_of(world).beside_kinds("64x64")
    kept = [one for _, _, found in world.log for one in found if isinstance(one, KeepProfile)]
    assert [one.profile for one in kept] == [profile_of(world)]
    world.replay()


@pytest.mark.parametrize("policy", ["static", "continuous-serial", "continuous-parallel"])
def test_nothing_is_measured_for_a_policy_that_makes_no_use_of_it(policy: str) -> None:
    world = make_world(policy)
    world.settle()
    assert num_turns(world) == 0
    assert profile_of(world).source == "short"


def test_a_busy_device_is_measured_between_slots_with_a_pause() -> None:
    world = make_world()
    for number in range(4):
        world.submit(make_request(f"r{number}", steps=2_000))
    begun_at: list[float] = []
    while not world.core.unets or profile_of(world).source == "short":
        while world.mail:
            before = num_turns(world)
            world.deliver()
            begun_at += [world.now] * (num_turns(world) - before)
        for name in [name for name, unet in world.unets.items() if unet.slots]:
            world.run_slot(name)
        world.tick(0.1)
        assert world.now < 30.0
    pauses = [second - first for first, second in pairwise(begun_at)]
    assert min(pauses) >= PAUSE_S - 1e-9
    assert len(world.ran) > 100  # requests went on meanwhile
    assert not world.final


def test_no_slot_is_sent_while_a_measurement_runs() -> None:
    world = make_world()
    deliver_until_measuring(world)
    world.submit(make_request("r"))
    answers, world.mail = world.mail, type(world.mail)()
    admitted = [one for one in answers if isinstance(one, messages.RequestAdmitted)]
    for one in admitted:
        world.feed(one)
    (unet,) = world.unets.values()
    assert admitted
    assert not unet.slots
    for one in answers:
        if one not in admitted:
            world.feed(one)
    assert unet.slots


def test_slots_that_never_end_stop_no_request() -> None:
    world = make_world()
    deliver_until_measuring(world)
    world.submit(make_request("a", steps=50))
    world.settle()
    (unet,) = world.unets.values()
    assert unet.slots
    # The next measurement is due, the slots in flight don't end: a second request goes on.
    world.tick(PAUSE_S)
    world.tick(MAX_HOLD_S + 0.1)
    begun = num_turns(world)
    (name,) = world.unets
    world.run_slot(name)
    world.settle()
    assert num_turns(world) == begun
    assert len(unet.slots) == 2


def test_a_measurement_whose_decoder_is_lost_is_taken_again_with_another() -> None:
    world = make_world()
    asked = deliver_until_measuring(world)
    (vae,) = world.vaes
    world.mail.clear()
    world.kill_worker(vae)
    world.start_worker("vae", "vae-1")
    world.deliver()
    world.deliver()
    assert num_turns(world) == asked.number
    world.tick(PAUSE_S)
    again = [one for one in last_commands(world) if isinstance(one, messages.MeasureSlot)]
    assert [replace(one, number=asked.number) for one in again] == [asked]
    world.settle()
    assert profile_of(world).source == "calibrated"


def test_a_measurement_whose_unet_is_lost_begins_anew_with_its_successor() -> None:
    world = make_world()
    deliver_until_measuring(world)
    world.mail.clear()
    world.start_worker("unet", "unet-0")
    world.settle()
    assert profile_of(world).source == "calibrated"


def test_workers_that_never_answer_are_asked_a_few_times_and_serve() -> None:
    world = make_world()
    deliver_until_measuring(world)
    for _ in range(100):
        world.mail.clear()
        world.tick()
    assert profile_of(world).source == "short"
    numbers = num_turns(world)
    world.tick(60.0)
    assert num_turns(world) == numbers
    assert numbers <= MAX_UNANSWERED + 16
    world.submit(make_request("r"))
    world.run_until_quiet()
    assert world.final == {"r": "done"}


def test_an_answer_to_an_earlier_question_changes_nothing() -> None:
    world = make_world()
    asked = deliver_until_measuring(world)
    (unet,) = world.unets
    begun = num_turns(world)
    for number in (asked.number - 1, asked.number + 1):
        world.feed(
            messages.SlotMeasured(
                incarnation=unet, epoch=world.epoch, number=number, step_ms=1_000.0
            )
        )
    assert num_turns(world) == begun
    world.settle()
    for slot in profile_of(world).slots:
        assert max(slot.step_ms.values()) < 1_000.0


def test_a_worker_like_one_that_was_measured_has_its_profile() -> None:
    world = make_world()
    world.settle()
    begun = num_turns(world)
    world.start_worker("unet", "unet-1", group="other")
    world.start_worker("vae", "vae-1", group="other")
    world.settle()
    assert num_turns(world) == begun
    assert {unet.profile.source for unet in world.core.unets.values()} == {"calibrated"}
