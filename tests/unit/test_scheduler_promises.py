"""What plans, admission and the simulator promise, told one case at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from scheduler_world import World, make_request

from services.scheduler.policies import POLICY_NAMES, PolicyOptions, make_policy
from services.scheduler.profile import (
    DecodeTiming,
    Profile,
    SlotKind,
    SlotTiming,
    profile_in_short,
)
from services.scheduler.simulation.arrivals import (
    Arrival,
    Mix,
    format_trace,
    make_arrivals,
    parse_trace,
)
from services.scheduler.simulation.simulator import Simulation, SimulationSettings
from services.scheduler.simulation.unet import Resident
from services.scheduler.threshold import Stretches, Threshold, ThresholdRule
from services.unet_worker.guidance import GuidanceRecord, can_skip
from shared import messages
from shared.errors import ConfigurationError
from shared.guidance_skip import SKIP_LEVELS


def a_world(policy: str = "synerdiff", options: PolicyOptions | None = None) -> World:
    world = World(policy=policy, options=options or PolicyOptions())
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    world.settle()
    return world


def test_a_decode_waits_no_longer_than_its_bound_whatever_the_threshold() -> None:
    rule = ThresholdRule(min_value=1.0, first_value=1.0, max_value=1.0, is_adaptive=False)
    options = PolicyOptions(rule=rule, max_decode_wait_s=2.0)
    world = a_world("synerdiff-without-skip", options)
    world.submit(make_request("short", steps=1))
    for number in range(4):
        world.submit(make_request(f"long{number}", steps=200))
    world.settle()
    for _ in range(60):
        for name, unet in world.unets.items():
            if unet.slots:
                world.run_slot(name)
        for vae in world.vaes:
            for request_id in world.decodable(vae):
                world.decode(vae, request_id)
        world.settle()
        world.tick(0.1)
        if "short" in world.final:
            break
    assert world.final["short"] == "done"
    assert world.now <= 2.0 + 5 * 0.1 + 0.5


def only(names: Iterable[str]) -> str:
    (name,) = names
    return name


def roomy_profile() -> Profile:
    """One UNet thread is as fast as two, and a chunk beside it costs next to nothing."""
    alone = {2: 20.0, 8: 40.0}
    beside = SlotKind(unet_threads=1, vae_threads=1, chunks=4)
    return Profile(
        model_id="m",
        device="cpu",
        dtype="float32",
        threads=2,
        slots=(
            SlotTiming(key="64x64", kind=SlotKind(unet_threads=2), step_ms=alone),
            SlotTiming(key="64x64", kind=SlotKind(unet_threads=1), step_ms=alone),
            SlotTiming(
                key="64x64", kind=beside, step_ms={2: 21.0, 8: 41.0}, chunks_ms={2: 18.0, 8: 18.0}
            ),
        ),
        decodes=(DecodeTiming(key="64x64", threads=2, chunk_ms=(4.0,) * 4),),
    )


def sent(world: World, kind: type[messages.Message]) -> list[Any]:
    said = [getattr(one, "message", None) for _, _, commands in world.log for one in commands]
    return [message for message in said if isinstance(message, kind)]


def until_a_decode_comes(world: World) -> list[int]:
    """Numbers of the slots in flight then; one long request keeps the UNet busy."""
    world.submit(make_request("short", steps=1))
    world.submit(make_request("long", steps=50))
    world.settle()
    unet = next(iter(world.unets))
    while not any(vae.decodes for vae in world.vaes.values()):
        world.run_slot(unet)
        world.settle()
    return [slot.seq for slot in world.unets[unet].slots]


def test_a_decode_that_comes_while_slots_are_in_flight_begins_beside_them() -> None:
    world = World(policy="synerdiff", profiles=(roomy_profile(),))
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    in_flight = until_a_decode_comes(world)
    grants = sent(world, messages.GrantChunks)
    assert sum(grant.chunks for grant in grants) == 4
    assert grants[0].beside_seq == in_flight[0]
    (unet,) = world.core.unets.values()
    assert {grant.pool for grant in grants} == {unet.info.pool}
    slots = sent(world, messages.DenoiseSlot)
    assert {slot.shape.threads_beside for slot in slots} == {1}, "they give way to whoever comes"


def test_the_slot_behind_a_last_step_leaves_room_for_the_decode() -> None:
    world = World(policy="synerdiff", profiles=(roomy_profile(),))
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    until_a_decode_comes(world)
    slots = sent(world, messages.DenoiseSlot)
    last = max(
        i for i, slot in enumerate(slots) if any(row.request_id == "short" for row in slot.rows)
    )
    assert slots[last].shape.waiting_share == 0.5, "nobody comes: all parts are alike"
    assert slots[last + 1].kind == "beside"
    assert slots[last + 1].shape.waiting_share < 0.5


def assert_nothing_ran_beside_a_slot(world: World) -> None:
    in_flight: set[int] = set()
    granted: set[str] = set()
    for event, _, commands in world.log:
        if isinstance(event, messages.SlotDenoised):
            in_flight.discard(event.seq)
        if isinstance(event, messages.ChunksDecoded):
            granted.discard(event.request_id)
        for message in (getattr(command, "message", None) for command in commands):
            if isinstance(message, messages.DenoiseSlot):
                assert not granted
                in_flight.add(message.seq)
            if isinstance(message, messages.GrantChunks):
                # Behind every slot that was sent.
                assert all(seq < message.beside_seq for seq in in_flight)
                granted.add(message.request_id)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_where_a_device_runs_one_process_at_a_time_decodes_go_into_gaps(policy: str) -> None:
    world = World(policy=policy, profiles=(roomy_profile(),))
    world.start_worker("unet", "unet-0", runs_side_by_side=False)
    world.start_worker("vae", "vae-0")
    for number in range(6):
        world.submit(make_request(f"r{number}", steps=3 * number + 1))
    world.run_until_quiet()
    world.submit(make_request("late", steps=2))
    world.run_until_quiet()
    assert set(world.final.values()) == {"done"}
    assert_nothing_ran_beside_a_slot(world)


def test_one_worker_of_a_device_that_takes_turns_is_enough_for_all_until_it_leaves() -> None:
    world = World(policy="synerdiff", profiles=(roomy_profile(),))
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    world.start_worker("vae", "vae-1", runs_side_by_side=False)
    world.start_worker("vae", "vae-2", group="other device", runs_side_by_side=False)
    world.settle()
    (unet,) = world.core.unets.values()
    assert not unet.profile.beside_kinds("64x64")
    (turns,) = [name for name in world.vaes if name.startswith("vae-1")]
    world.kill_worker(turns)
    world.settle()
    assert unet.profile.beside_kinds("64x64")


def test_what_a_slot_took_beyond_its_plan_is_owed_by_the_next_ones() -> None:
    world = World(policy="synerdiff", profiles=(roomy_profile(),))
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    world.submit(make_request("one", steps=50))
    world.settle()
    unet = next(iter(world.core.unets.values()))
    first = unet.slots[0].seq
    planned_ms = next(spent.ms for spent in unet.ledger if spent.seq == first)
    world.drift = 10.0
    world.run_slot(unet.info.incarnation)
    world.settle()
    spent_ms = next(spent.ms for spent in unet.ledger if spent.seq == first)
    assert planned_ms == 20.0
    assert spent_ms == 100.0


def test_owners_take_turns_at_admission() -> None:
    world = a_world()
    for number in range(20):
        world.submit(make_request(f"greedy{number}", steps=50, owner="greedy"))
    world.submit(make_request("modest", steps=50, owner="modest", submitted_at=0.001))
    assert world.core.queue_order(world.now)[0] == "modest"


def test_an_earlier_deadline_goes_first_within_a_priority() -> None:
    world = a_world()
    for number in range(20):
        world.submit(make_request(f"full{number}", steps=50, owner="x"))
    world.submit(make_request("whenever", steps=5, owner="y"))
    world.submit(make_request("soon", steps=5, owner="y", deadline_ms=60_000))
    order = [name for name in world.core.queue_order(world.now) if not name.startswith("full")]
    assert order == ["soon", "whenever"]


def test_a_deadline_that_nobody_could_keep_is_refused_and_not_dropped() -> None:
    world = a_world()
    world.submit(make_request("hopeless", steps=50, deadline_ms=20))
    assert world.final == {"hopeless": "failed"}


@pytest.mark.parametrize("num_slots", [0, 1, 3])
def test_nobody_computes_for_a_request_whose_time_is_over(num_slots: int) -> None:
    world = a_world()
    world.submit(make_request("late", steps=3, deadline_ms=1_000))
    world.settle()
    for _ in range(num_slots):
        world.run_slot(only(world.unets))
        world.settle()
    world.tick(1.5)
    assert world.final == {"late": "failed"}
    assert world.failures == {"late": "deadline_exceeded"}
    for unet in world.unets.values():
        assert not unet.held
    for vae in world.vaes.values():
        assert not vae.decodes


def test_one_request_alone_skips_nothing() -> None:
    world = a_world()
    world.submit(make_request("alone", steps=12, guidance_skip="fast"))
    world.settle()
    seen = []
    for _ in range(12):
        for name in list(world.unets):
            if world.unets[name].slots:
                seen += [row.skip for row in world.unets[name].slots[0].rows]
                world.run_slot(name)
        world.settle()
    assert seen
    assert not any(seen)


def test_a_lost_group_s_requests_go_on_elsewhere() -> None:
    world = a_world()
    world.start_worker("unet", "unet-1", group="other")
    world.settle()
    for number in range(6):
        world.submit(make_request(f"r{number}", steps=5))
    world.settle()
    held = {unet.info.worker_id: set(unet.held) for unet in world.unets.values()}
    assert all(held.values())
    world.kill_worker(next(name for name in world.unets if name.startswith("unet-1")))
    world.run_until_quiet()
    assert set(world.final.values()) == {"done"}


def test_the_threshold_steps_to_its_limits_and_rests_in_between() -> None:
    rule = ThresholdRule()
    threshold = Threshold(value=rule.first_value)
    values = []
    for _ in range(400):
        threshold = threshold.after_slot(rule, Stretches(unet=9.0, vae=1.0))
        values.append(threshold.value)
    assert values == sorted(values)
    assert values[-1] == rule.max_value
    even = threshold
    for _ in range(100):
        even = even.after_slot(rule, Stretches(unet=2.0, vae=2.2))
    assert even.value == threshold.value
    for _ in range(400):
        threshold = threshold.after_slot(rule, Stretches(unet=0.0, vae=9.0))
    assert threshold.value == rule.min_value


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_simulation_serves_everything_and_repeats_itself(policy: str) -> None:
    unet, vae = (next(iter(workers.values())).info for workers in (a_world().unets, a_world().vaes))
    profile = profile_in_short(unet, [vae])
    arrivals = make_arrivals("poisson", rate=6.0, duration_s=3.0, mix=Mix(), seed=3)
    settings = SimulationSettings(num_groups=2)
    first = Simulation(profile, make_policy(policy), arrivals, settings).run().summary()
    assert first["finished"] == len(arrivals)
    assert first == Simulation(profile, make_policy(policy), arrivals, settings).run().summary()


def test_decodes_go_to_vae_workers_elsewhere_while_the_unet_goes_on() -> None:
    arrivals = make_arrivals(
        "poisson", rate=8.0, duration_s=2.0, mix=Mix(sizes=((64, 64), (64, 128))), seed=4
    )
    decode_s = {}
    for elsewhere in (0, 2):
        settings = SimulationSettings(vaes_elsewhere=elsewhere, jitter=0.0)
        simulation = Simulation(roomy_profile(), make_policy("synerdiff"), arrivals, settings)
        figures = simulation.run().summary()
        assert figures["finished"] == len(arrivals)
        decode_s[elsewhere] = figures["decode_latency_s"]["mean"]
    assert decode_s[2] < decode_s[0]


def test_a_trace_survives_its_file() -> None:
    arrivals = make_arrivals("bursty", rate=2.0, duration_s=20.0, mix=Mix(), seed=1)
    assert parse_trace(format_trace(arrivals)) == arrivals


def test_a_trace_with_a_misspelt_skip_level_names_its_line() -> None:
    arrivals = make_arrivals("backlog", rate=2.0, duration_s=1.0, mix=Mix(), seed=1)
    trace = format_trace(arrivals).replace("balanced", "balancd", 2).replace("balancd", "off", 1)
    with pytest.raises(ConfigurationError, match=r"line 2: .*balancd.*off, balanced, fast"):
        parse_trace(trace)


def test_a_simulated_worker_keeps_the_real_gaps_between_full_steps() -> None:
    level = SKIP_LEVELS["balanced"]
    assert level is not None
    resident = Resident(arrival=Arrival(at_s=0.0, num_steps=25), attempt="1-1")
    record, full_steps, simulated_full_steps = GuidanceRecord(), [], []
    for step_index in range(25):
        if not can_skip(level, record, step_index, 25):
            record = record.after_full_step(step_index, 0.0)
            full_steps.append(step_index)
        is_skipped = resident.skip_steps > 0
        simulated_full_steps += [] if is_skipped else [step_index]
        resident.advance(was_skipped=is_skipped)
    assert simulated_full_steps == full_steps


def test_a_serial_decode_is_granted_all_its_chunks_once() -> None:
    world = a_world("continuous-serial")
    world.submit(make_request("one", steps=1))
    world.run_until_quiet()
    grants = [
        command.message
        for _, _, commands in world.log
        for command in commands
        if isinstance(getattr(command, "message", None), messages.GrantChunks)
    ]
    assert sum(grant.chunks for grant in grants) == 4
