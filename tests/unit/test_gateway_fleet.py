from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fake_backend import MODEL, make_worker

from services.gateway.fleet import MODEL_MEMORY_S, STALE_AFTER_S, Fleet, look
from shared.messages import WorkerInfo

BOTH = (make_worker("unet"), make_worker("vae"))


def see(
    workers: Sequence[WorkerInfo],
    *,
    before: Fleet | None = None,
    status: dict[str, Any] | None = None,
    memory_fraction: float = 0.0,
    now: float = 100.0,
) -> Fleet:
    return look(
        before or Fleet(),
        workers=workers,
        status={"queue": []} if status is None else status,
        memory_fraction=memory_fraction,
        now=now,
        wall_now=1e9 + now,
    )


def test_a_fleet_is_ready_with_both_kinds_of_worker_and_a_scheduler() -> None:
    assert see(BOTH).reasons_not_ready(100.0) == ()


def test_what_is_missing_is_the_reason_not_to_be_ready() -> None:
    assert see([]).reasons_not_ready(100.0) == ("no UNet worker has registered",)
    assert see(BOTH[:1]).reasons_not_ready(100.0) == ("the VAE worker of fake is missing",)
    assert see(BOTH[1:]).reasons_not_ready(100.0) == ("no UNet worker has registered",)
    gone = look(Fleet(), workers=BOTH, status=None, memory_fraction=0.95, now=100.0, wall_now=1e9)
    assert gone.reasons_not_ready(100.0) == (
        "no scheduler is alive",
        "Redis has used 95% of its memory",
    )


def test_workers_of_two_models_do_not_make_one_model_ready() -> None:
    other = replace(MODEL, model_id="other")
    fleet = see([make_worker("unet"), make_worker("vae", other)])
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
    fleet = see(BOTH, status={"queue": ["a", "b"]})
    assert [fleet.queue_position(name) for name in "abc"] == [1, 2, None]


def test_the_store_is_full_beyond_nine_tenths_of_its_memory() -> None:
    assert not see(BOTH, memory_fraction=0.9).is_store_full
    assert see(BOTH, memory_fraction=0.91).is_store_full
