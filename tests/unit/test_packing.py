"""Who is in the next slots."""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import given
from hypothesis import strategies as st
from scheduler_world import make_request, make_worker

from services.scheduler.core.state import Request, Stage, UnetWorker
from services.scheduler.devices.profile import profile_in_short
from services.scheduler.planning.packing import Batch, pack_batches
from services.scheduler.planning.threshold import Threshold

INFO = make_worker("unet", "u", "u")
UNET = UnetWorker(info=INFO, profile=profile_in_short(INFO, ()), threshold=Threshold(value=1.0))
KNEE = UNET.profile.knee("64x64")


def first_batch(guided: Collection[bool], may_skip: Collection[str]) -> Batch:
    requests = [
        Request(
            request=make_request(f"r{i}", submitted_at=float(i)),
            stage=Stage.DENOISING,
            num_forwards=20,
            is_guided=is_guided,
        )
        for i, is_guided in enumerate(guided)
    ]
    return pack_batches(requests, UNET, 100.0, max_rows=0, num_slots=1, may_skip=may_skip)[0]


def ids(batch: Batch) -> list[str]:
    return [one.request_id for one in batch.requests]


def test_whoever_may_skip_leaves_a_row_to_others_where_not_all_fit() -> None:
    assert KNEE == 4
    assert ids(first_batch([True] * 5, ())) == ["r0", "r1"]
    batch = first_batch([True] * 5, {"r0", "r1", "r4"})
    assert ids(batch) == ["r0", "r1", "r2"]
    assert (batch.rows, batch.min_skips) == (6, 2)


def test_nobody_must_skip_where_all_fit() -> None:
    batch = first_batch([True] * 2, {"r0", "r1"})
    assert (batch.rows, batch.min_skips) == (4, 0)


@given(
    guided=st.lists(st.booleans(), min_size=1, max_size=12),
    skipping=st.sets(st.integers(0, 11)),
)
def test_a_batch_keeps_the_knee_and_leaves_no_place_that_the_oldest_left_could_take(
    guided: list[bool], skipping: set[int]
) -> None:
    may_skip = {f"r{i}" for i in skipping if i < len(guided) and guided[i]}
    batch = first_batch(guided, may_skip)
    num_skippable = len(may_skip & set(ids(batch)))
    assert batch.min_skips <= num_skippable
    assert batch.rows - batch.min_skips <= KNEE
    taken = batch.rows - (num_skippable if batch.min_skips else 0)
    left = [i for i in range(len(guided)) if f"r{i}" not in ids(batch)]
    if left and batch.min_skips:
        needed = 1 if f"r{left[0]}" in may_skip or not guided[left[0]] else 2
        assert taken + needed > KNEE
