from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from fake_backend import MODEL, make_worker

from services.gateway.fleet import (
    MODEL_MEMORY_S,
    RESTART_GRACE_S,
    STALE_AFTER_S,
    Fleet,
    Status,
    StoreState,
    look,
    read_status,
)
from services.gateway.http_errors import ApiError
from services.gateway.models_api import check_is_served, check_store, choose_model
from shared import codec
from shared.messages import WorkerInfo

BOTH = (make_worker("unet"), make_worker("vae"))
OTHER = replace(MODEL, model_id="other")
BOTH_OF_OTHER = (make_worker("unet", OTHER), make_worker("vae", OTHER))
ALIVE = Status()


def see(
    workers: Sequence[WorkerInfo],
    *,
    before: Fleet | None = None,
    status: Status | None = ALIVE,
    store: StoreState | None = None,
    now: float = 100.0,
) -> Fleet:
    return look(
        before or Fleet(),
        workers=workers,
        status=status,
        store=store or StoreState(),
        now=now,
        wall_now=1e9 + now,
    )


def test_a_fleet_is_ready_with_both_kinds_of_worker_and_a_scheduler() -> None:
    assert see(BOTH).reasons_not_ready(100.0) == ()


def test_what_is_missing_is_the_reason_not_to_be_ready() -> None:
    assert see([]).reasons_not_ready(100.0) == ("no UNet worker has registered",)
    assert see(BOTH[:1]).reasons_not_ready(100.0) == ("the VAE worker of fake is missing",)
    assert see(BOTH[1:]).reasons_not_ready(100.0) == ("no UNet worker has registered",)
    gone = see(BOTH, status=None, store=StoreState(memory_fraction=0.95))
    assert gone.reasons_not_ready(100.0) == (
        "no scheduler is alive",
        "Redis has used 95% of its memory",
    )


def test_workers_of_two_models_do_not_make_one_model_ready() -> None:
    fleet = see([make_worker("unet"), make_worker("vae", OTHER)])
    assert fleet.reasons_not_ready(100.0) == ("the VAE worker of fake is missing",)


def test_an_old_look_means_that_redis_does_not_answer() -> None:
    assert Fleet().reasons_not_ready(0.0) == ("Redis does not answer",)
    assert see(BOTH).reasons_not_ready(100.0 + STALE_AFTER_S + 0.1) == ("Redis does not answer",)


def test_a_model_is_remembered_while_its_workers_restart_and_then_forgotten() -> None:
    before = see(BOTH)
    soon = see([], before=before, now=100.0 + MODEL_MEMORY_S - 1)
    assert "fake" in soon.models
    assert not soon.models["fake"].is_ready
    later = see([], before=soon, now=100.0 + MODEL_MEMORY_S + 1)
    assert not later.models


def test_a_model_keeps_the_instant_at_which_it_was_first_seen() -> None:
    again = see(BOTH, before=see(BOTH), now=150.0)
    assert again.models["fake"].first_seen_at == 1e9 + 100.0


def test_the_limit_of_the_smallest_worker_holds() -> None:
    small = make_worker("unet", replace(MODEL, max_side=64), number=1)
    assert see([*BOTH, small]).models["fake"].info.max_side == 64


def test_the_queue_position_is_counted_from_one() -> None:
    fleet = see(BOTH, status=Status(queue=("a", "b")))
    assert [fleet.queue_position(name) for name in "abc"] == [1, 2, None]


def test_the_store_is_full_beyond_nine_tenths_of_its_memory() -> None:
    assert not see(BOTH, store=StoreState(memory_fraction=0.9)).is_store_full
    assert see(BOTH, store=StoreState(memory_fraction=0.91)).is_store_full


@pytest.mark.parametrize(
    ("store", "code"),
    [
        (StoreState(write_error="MISCONF No space left on device"), "store_unavailable"),
        (StoreState(write_error="OOM", is_out_of_memory=True), "store_full"),
        (StoreState(memory_fraction=0.95), "store_full"),
    ],
)
def test_a_store_that_takes_nothing_is_not_ready_and_accepts_nothing(
    store: StoreState, code: str
) -> None:
    fleet = see(BOTH, store=store)
    assert len(fleet.reasons_not_ready(100.0)) == 1
    with pytest.raises(ApiError) as caught:
        check_store(fleet, 100.0)
    assert (caught.value.status, caught.value.code) == (503, code)
    assert caught.value.retry_after_s


def test_a_store_that_does_not_answer_is_not_waited_for() -> None:
    check_store(see(BOTH), 100.0 + STALE_AFTER_S)
    with pytest.raises(ApiError, match="does not answer"):
        check_store(see(BOTH), 100.1 + STALE_AFTER_S)


def test_a_request_without_a_model_goes_to_one_that_is_ready() -> None:
    assert choose_model(None, see([*BOTH, *BOTH_OF_OTHER])).info.model_id == "fake"
    for left in (BOTH[:1], BOTH[1:], ()):
        fleet = see([*left, *BOTH_OF_OTHER], before=see([*BOTH, *BOTH_OF_OTHER]))
        assert choose_model(None, fleet).info.model_id == "other"


def test_where_no_model_is_ready_a_request_without_one_goes_to_the_last_that_was() -> None:
    first = see(BOTH)
    then = see(BOTH_OF_OTHER, before=first, now=110.0)
    assert choose_model(None, see([], before=then, now=120.0)).info.model_id == "other"


def test_the_default_model_of_the_settings_holds_whether_it_is_ready_or_not() -> None:
    fleet = see([*BOTH, *BOTH_OF_OTHER[:1]])
    assert choose_model(None, fleet, default="other").info.model_id == "other"
    assert choose_model("fake", fleet, default="other").info.model_id == "fake"
    with pytest.raises(ApiError, match="default model third") as caught:
        choose_model(None, fleet, default="third")
    assert caught.value.status == 503


@pytest.mark.parametrize(("left", "missing"), [(BOTH[:1], "the VAE"), (BOTH[1:], "the UNet")])
def test_requests_wait_for_a_worker_that_restarts_and_for_none_that_is_gone(
    left: Sequence[WorkerInfo], missing: str
) -> None:
    soon = see(left, before=see(BOTH), now=99.0 + RESTART_GRACE_S)
    check_is_served(soon.models["fake"], soon, soon.looked)
    later = see(left, before=soon, now=101.0 + RESTART_GRACE_S)
    with pytest.raises(ApiError, match=f"{missing} worker of fake is missing") as caught:
        check_is_served(later.models["fake"], later, later.looked)
    assert (caught.value.status, caught.value.code) == (503, "not_ready")


def test_a_model_that_never_had_both_kinds_of_worker_accepts_nothing() -> None:
    fleet = see(BOTH[:1])
    with pytest.raises(ApiError, match="the VAE worker of fake is missing"):
        check_is_served(fleet.models["fake"], fleet, 100.0)


def test_requests_wait_for_a_scheduler_that_restarts_and_for_none_that_is_gone() -> None:
    soon = see(BOTH, before=see(BOTH), status=None, now=99.0 + RESTART_GRACE_S)
    check_is_served(soon.models["fake"], soon, soon.looked)
    later = see(BOTH, before=soon, status=None, now=101.0 + RESTART_GRACE_S)
    with pytest.raises(ApiError, match="no scheduler is alive"):
        check_is_served(later.models["fake"], later, later.looked)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        codec.encode_value([1]),
        codec.encode_value({"queue": 3, "capacity": 4}),
        codec.encode_value({1: 2}),
    ],
)
def test_a_status_that_makes_no_sense_tells_nothing_and_does_no_harm(payload: bytes) -> None:
    status = read_status(payload, 100.0)
    assert status is None or (status.queue, dict(status.capacities.by_model)) == ((), {})
