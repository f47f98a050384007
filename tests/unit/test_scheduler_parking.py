"""Whatever an event holds, and whatever makes planning raise: the scheduler goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf, nan
from typing import Any, cast

import pytest
from scheduler_world import POISON, World, make_request, make_worker

from services.scheduler.events import Event, RequestRecovered
from shared import messages


def a_world(policy: str = "synerdiff") -> World:
    world = World(policy=policy)
    world.start_worker("unet", "unet-0")
    world.start_worker("vae", "vae-0")
    world.settle()
    world.submit(make_request("good", steps=4))
    world.settle()
    return world


def odd_request(**changes: Any) -> messages.GenerateImage:
    request = make_request("odd")
    names = {one for one in messages.ImageParameters.__slots__ if one in changes}
    parameters = replace(request.parameters, **{name: changes.pop(name) for name in names})
    return replace(request, parameters=parameters, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"priority": cast("int", inf)},
        {"priority": cast("int", nan)},
        {"priority": 10**30},
        {"deadline_ms": -1},
        {"deadline_ms": cast("int", inf)},
        {"submitted_at": nan},
        {"submitted_at": -inf},
        {"height": 0},
        {"width": -64},
        {"width": 10**12},
        {"num_inference_steps": 0},
        {"num_inference_steps": -3},
        {"num_inference_steps": 10**15},
        {"guidance_scale": nan},
        {"guidance_scale": inf},
        {"model": ""},
    ],
)
@pytest.mark.parametrize("is_recovered", [False, True])
def test_a_request_out_of_all_range_is_parked_and_fails(
    changes: dict[str, Any], is_recovered: bool
) -> None:
    world = a_world()
    odd = odd_request(**changes)
    world.open_requests["odd"] = odd
    recovered = RequestRecovered(request=odd, attempt="", num_attempts=0)
    event = recovered if is_recovered else odd
    world.feed(event)
    assert [one.event for one in world.parked] == [event]
    assert world.failures == {"odd": "unprocessable"}
    assert "odd" not in world.core.requests
    world.run_until_quiet()
    assert world.final == {"odd": "failed", "good": "done"}


def test_an_odd_copy_of_an_entry_does_not_fail_the_request_that_is_there() -> None:
    world = a_world()
    world.feed(replace(make_request("good"), priority=10**9))
    assert len(world.parked) == 1
    world.run_until_quiet()
    assert world.final == {"good": "done"}


def a_worker(**changes: Any) -> messages.WorkerRegistered:
    kind = changes.get("kind", "unet")
    worker = make_worker("vae" if kind == "vae" else "unet", "unet-0", "odd-1")
    return messages.WorkerRegistered(worker=replace(worker, **changes))


@pytest.mark.parametrize(
    "event",
    [
        a_worker(step_ms={}),
        a_worker(step_ms={2: 0.0}),
        a_worker(step_ms={2: nan}),
        a_worker(step_ms={0: 1.0}),
        a_worker(max_requests=0),
        a_worker(threads=-1),
        a_worker(kind="neither"),
        a_worker(worker_id=""),
        a_worker(kind="vae", num_chunks=0),
        a_worker(kind="vae", decode_ms=nan),
        messages.DenoiseSlot(epoch=1, seq=1, kind="alone", threads=1, rows=()),
        messages.RequestsProgressed(items=()),
    ],
)
def test_a_registration_that_can_t_be_used_and_messages_for_others_are_parked(event: Event) -> None:
    world = a_world()
    workers = [*world.core.unets, *world.core.vaes]
    world.feed(event)
    assert [one.event for one in world.parked] == [event]
    assert [*world.core.unets, *world.core.vaes] == workers, "whoever was there still is"
    world.run_until_quiet()
    assert world.final == {"good": "done"}


Answer = Callable[[str, str, str], messages.Message]


@pytest.mark.parametrize(
    "make",
    [
        lambda worker, name, attempt: messages.RequestAdmitted(
            incarnation=worker,
            request_id=name,
            attempt=attempt,
            num_forwards=-1,
            is_guided=True,
        ),
        lambda worker, name, attempt: messages.RequestHandedBack(
            incarnation=worker, request_id=name, attempt=attempt, step_index=-7
        ),
        lambda worker, name, attempt: messages.ChunksDecoded(
            incarnation=worker,
            request_id=name,
            attempt=attempt,
            chunks_done=-1,
            duration_ms=1.0,
        ),
    ],
)
def test_an_odd_answer_about_a_request_fails_it_and_no_other(make: Answer) -> None:
    world = a_world()
    world.submit(make_request("other", steps=4))
    world.settle()
    (unet,) = world.unets
    world.feed(cast("Event", make(unet, "good", world.core.requests["good"].attempt)))
    assert len(world.parked) == 1
    assert world.failures == {"good": "unprocessable"}
    world.run_until_quiet()
    assert world.final == {"good": "failed", "other": "done"}


@pytest.mark.parametrize("duration_ms", [nan, inf, -1.0])
def test_a_slot_s_odd_answer_lets_its_requests_begin_again(duration_ms: float) -> None:
    world = a_world()
    (unet,) = world.unets
    world.run_slot(unet)
    answer = world.mail.popleft()
    assert isinstance(answer, messages.SlotDenoised)
    world.feed(replace(answer, duration_ms=duration_ms))
    assert len(world.parked) == 1
    world.run_until_quiet()
    assert world.final == {"good": "done"}
    assert len(world.attempts["good"]) == 2


@pytest.mark.parametrize(
    "event",
    [
        messages.RequestCancelled(request_id="nobody"),
        messages.WorkerLost(incarnation="nobody"),
        messages.WorkerDraining(incarnation="nobody"),
        messages.WorkerAnnounced(incarnation="nobody", epoch=1_000),
        messages.RequestHandedBack(
            incarnation="nobody", request_id="good", attempt="x", step_index=1
        ),
        messages.ImageDecoded(
            incarnation="nobody", request_id="x", attempt="x", decode_ms=1.0, transport="shm"
        ),
        messages.SlotMeasured(incarnation="nobody", epoch=1_000, number=1, step_ms=1.0),
        messages.HandleLost(incarnation="nobody", request_id="good", attempt="x", reason=""),
        messages.CommitRefused(incarnation="nobody", request_id="good", attempt="x"),
    ],
)
def test_what_names_nobody_known_changes_nothing(event: Event) -> None:
    world = a_world()
    world.feed(event)
    assert not world.parked
    world.run_until_quiet()
    assert world.final == {"good": "done"}


@pytest.mark.parametrize("policy", ["synerdiff", "continuous-parallel", "static"])
def test_a_request_that_makes_planning_raise_fails_and_the_others_go_on(policy: str) -> None:
    world = a_world(policy)
    world.submit(make_request("before", steps=3))
    world.submit(make_request(POISON, steps=3))
    world.submit(make_request("behind", steps=3))
    world.run_until_quiet()
    assert world.failures == {POISON: "unprocessable"}
    assert [one.event.request_id for one in world.parked if hasattr(one.event, "request_id")] == [
        POISON
    ]
    assert {name for name, state in world.final.items() if state == "done"} == {
        "good",
        "before",
        "behind",
    }


def test_two_that_make_planning_raise_end_it_no_more_than_one() -> None:
    world = a_world()
    for number in range(2):
        world.submit(make_request(f"{POISON}{number}", steps=3))
    world.submit(make_request("behind", steps=3))
    world.run_until_quiet()
    assert world.failures.keys() == {f"{POISON}0", f"{POISON}1"}
    assert set(world.final) == {"good", "behind", f"{POISON}0", f"{POISON}1"}
