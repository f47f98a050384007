"""Who is in the next slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from hypothesis import given
from hypothesis import strategies as st
from scheduler_world import make_request, make_worker

from services.scheduler.core.state import Request, Stage, UnetWorker
from services.scheduler.devices.choice import profile_in_short
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
    return [request.request_id for request in batch.requests]


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
def test_a_batch_keeps_the_knee_and_leaves_nobody_out_who_would_fit(
    guided: list[bool], skipping: set[int]
) -> None:
    may_skip = {f"r{i}" for i in skipping if i < len(guided) and guided[i]}
    batch = first_batch(guided, may_skip)
    rows = {f"r{i}": 2 if is_guided else 1 for i, is_guided in enumerate(guided)}
    chosen = ids(batch)
    assert batch.rows == sum(rows[name] for name in chosen)
    if sum(rows.values()) <= KNEE:
        assert chosen == list(rows)
        assert batch.min_skips == 0
        return
    least = {name: 1 if name in may_skip else count for name, count in rows.items()}
    used = sum(least[name] for name in chosen)
    assert used <= KNEE
    assert batch.min_skips == max(batch.rows - KNEE, 0)
    assert all(used + least[name] > KNEE for name in rows if name not in chosen)


def test_batch_keys_take_turns_by_the_time_of_their_slots() -> None:
    requests = [
        Request(request=make_request(name, side=side), stage=Stage.DENOISING, num_forwards=50)
        for name, side in (("small", 64), ("large", 128))
    ]
    batches = pack_batches(requests, UNET, 100.0, max_rows=0, num_slots=15)
    counts = Counter(batch.key.size for batch in batches)
    slot_ms = {size: UNET.durations.alone(size, 2).ms for size in counts}
    assert slot_ms["128x128"] == 4 * slot_ms["64x64"]
    assert counts == {"64x64": 12, "128x128": 3}


def test_a_key_whose_steps_are_over_leaves_its_turns_to_the_others() -> None:
    requests = [
        Request(request=make_request(name, side=side), stage=Stage.DENOISING, num_forwards=steps)
        for name, side, steps in (("short", 64, 1), ("long", 128, 9))
    ]
    batches = pack_batches(requests, UNET, 100.0, max_rows=0, num_slots=4)
    assert [ids(batch) for batch in batches].count(["long"]) == 3
