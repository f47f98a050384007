"""Profiles: questions to them, their file, and their slow correction."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_world import make_worker

from services.scheduler.devices.choice import matching_profile, profile_in_short
from services.scheduler.devices.drift import ALONE, MAX_RATIO, WEIGHT, Drift
from services.scheduler.devices.durations import Durations
from services.scheduler.devices.profile import DecodeTiming, Profile, SlotKind, SlotTiming
from services.scheduler.devices.profile_file import format_profile, parse_profile
from shared.errors import ConfigurationError
from shared.messages import SlotShape
from shared.profile_files import ChunkGranularity

BESIDE = SlotKind(unet_threads=1, vae_threads=1, chunks=2)
PROFILE = Profile(
    model_id="m",
    device="cpu",
    dtype="float32",
    threads=2,
    slots=(
        SlotTiming(
            key="64x64",
            kind=SlotKind(unet_threads=2),
            step_ms={1: 10.0, 2: 12.0, 4: 20.0, 8: 39.0},
        ),
        SlotTiming(
            key="64x64",
            kind=BESIDE,
            step_ms={1: 15.0, 8: 50.0},
            chunks_ms={1: 20.0, 8: 22.0},
        ),
    ),
    decodes=(DecodeTiming(key="64x64", threads=2, chunk_ms=(5.0, 5.0, 6.0, 4.0)),),
    encode_ms=3.0,
    granularity=ChunkGranularity(num_chunks=6, max_strip_fraction=0.25),
    notes={"cpu": "one that is not there"},
)


def test_the_knee_is_the_smallest_batch_near_the_best_throughput() -> None:
    assert PROFILE.knee("64x64") == 4


def test_durations_are_interpolated_and_other_sizes_scaled_by_pixels() -> None:
    alone = PROFILE.alone_kind("64x64")
    assert PROFILE.slot_ms("64x64", 3, alone) == (16.0, 0.0)
    assert PROFILE.slot_ms("128x64", 4, alone) == (40.0, 0.0)
    assert PROFILE.slot_ms("64x64", 8, BESIDE) == (50.0, 22.0)
    decode = PROFILE.decode("128x128")
    assert decode
    assert sum(decode.chunk_ms) == pytest.approx(80.0)


def test_a_slot_with_chunks_all_along_is_slower_than_one_with_a_few() -> None:
    kind = SlotKind(unet_threads=1, vae_threads=1, chunks=2)
    alone = SlotTiming(key="64x64", kind=SlotKind(unet_threads=1), step_ms={8: 60.0})
    beside = SlotTiming(key="64x64", kind=kind, step_ms={8: 70.0}, chunks_ms={8: 40.0})
    profile = replace(PROFILE, slots=(PROFILE.slots[0], alone, beside))
    # 30 ms of it ran alone, so half of it was done in the 40 ms beside the chunks.
    assert profile.beside_ms("64x64", 8, kind) == pytest.approx(80.0)
    outlasting = replace(beside, chunks_ms={8: 90.0})
    profile = replace(PROFILE, slots=(PROFILE.slots[0], alone, outlasting))
    assert profile.beside_ms("64x64", 8, kind) == pytest.approx(70.0)


def test_a_slot_that_is_not_split_gives_way_only_while_chunks_run() -> None:
    kind = SlotKind(unet_threads=1, vae_threads=1, chunks=2)
    alone = SlotTiming(key="64x64", kind=SlotKind(unet_threads=1), step_ms={8: 60.0})
    beside = SlotTiming(key="64x64", kind=kind, step_ms={8: 78.0}, chunks_ms={8: 78.0})
    durations = Durations(replace(PROFILE, threads=0, slots=(PROFILE.slots[0], alone, beside)))
    assert durations.alone("64x64", 8)[:2] == (SlotKind(unet_threads=2), 39.0)
    # At half of its speed for the 39 ms that a chunk takes.
    assert durations.beside("64x64", 8, 1, 1.0)[:2] == (kind, pytest.approx(39.0 + 39.0 / 2))
    assert durations.beside("64x64", 8, 2, 1.0)[:2] == (kind, pytest.approx(78.0))
    # Then it is over, and the other chunks are beside the next one.
    assert durations.beside("64x64", 8, 4, 1.0)[:2] == (kind, pytest.approx(156.0))


def shape(waiting_share: float) -> SlotShape:
    """Of a slot that one of two threads is left beside chunks."""
    return SlotShape(threads_beside=1, waiting_share=waiting_share)


@pytest.fixture
def in_parts() -> Durations:
    """Two threads, on each of which rows take 10 ms and 2 ms each; a chunk takes 8 ms."""
    rows = (2, 4, 8, 16, 32)
    both = SlotTiming(
        key="64x64", kind=SlotKind(unet_threads=2), step_ms={n: 10.0 + n for n in rows}
    )
    one = SlotTiming(
        key="64x64", kind=SlotKind(unet_threads=1), step_ms={n: 10.0 + 2 * n for n in rows}
    )
    beside = replace(
        one,
        kind=SlotKind(unet_threads=1, vae_threads=1, chunks=2),
        chunks_ms=dict.fromkeys(rows, 16.0),
    )
    return Durations(replace(PROFILE, threads=2, slots=(both, one, beside)))


def test_a_slot_of_parts_alike_waits_for_chunks_with_one_of_them(in_parts: Durations) -> None:
    alone = in_parts.alone_with_room("64x64", 8)
    assert (alone.ms, alone.shape) == (18.0, shape(0.5))
    assert in_parts.beside("64x64", 8, 1, 1.0, shape=alone.shape).ms == pytest.approx(18 + 8)
    # Once the others are done it has their place, beside the chunks.
    assert in_parts.beside("64x64", 8, 2, 1.5, shape=alone.shape).ms == pytest.approx(18 + 18)


def test_room_for_latecomers_leaves_as_many_threads_as_few_chunks_need(
    in_parts: Durations,
) -> None:
    [*alone, beside] = in_parts.profile.slots
    threads = (4, 3, 2)
    slots = [replace(alone[0], kind=SlotKind(unet_threads=n)) for n in threads]
    slots += [
        replace(beside, kind=SlotKind(unet_threads=4 - n, vae_threads=n, chunks=2)) for n in (1, 2)
    ]
    slots[-1] = replace(slots[-1], step_ms={n: 9.0 * ms for n, ms in beside.step_ms.items()})
    durations = Durations(replace(in_parts.profile, threads=4, slots=tuple(slots)))
    found = durations.alone_with_room("64x64", 16)
    assert found.shape == SlotShape(threads_beside=3, waiting_share=0.25)


def test_a_slot_that_chunks_will_be_beside_has_less_to_do_in_the_part_that_waits(
    in_parts: Durations,
) -> None:
    found = in_parts.beside("64x64", 16, 2, 1.0)
    # 12 rows meanwhile take 34 ms; 4 rows after 16 ms of chunks are done then, too.
    assert (found.ms, found.shape) == (pytest.approx(34.0), shape(4 / 16))
    assert in_parts.beside("64x64", 16, 2, 1.0, shape=shape(0.5)).ms == pytest.approx(26 + 16)


def test_a_small_slot_beside_chunks_is_not_split_at_all(in_parts: Durations) -> None:
    found = in_parts.beside("64x64", 4, 2, 1.0)
    assert (found.ms, found.shape) == (pytest.approx(18.0), shape(0.0))
    # Chunks that outlast it count until they are over.
    assert in_parts.beside("64x64", 4, 4, 1.0).ms == pytest.approx(32.0)


def test_a_profile_survives_its_file() -> None:
    assert parse_profile(format_profile(PROFILE)) == PROFILE
    without = replace(PROFILE, granularity=None)
    assert parse_profile(format_profile(without)) == without


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "synerdiff-profile", "version": 2}',
        format_profile(PROFILE).replace('"version": 2', '"version": 1'),
        format_profile(PROFILE).replace('"threads": 2', '"threads": "two"'),
        format_profile(PROFILE).replace('"unet_threads"', '"threads_of_the_unet"'),
        format_profile(PROFILE).replace('"step_ms": {', '"step_ms": {"one": 1.0, '),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"here\.json"):
        parse_profile(text, name="here.json")


def test_a_short_profile_offers_no_slots_beside_chunks() -> None:
    unet = make_worker("unet", "u", "u-1")
    vae = make_worker("vae", "v", "v-1")
    profile = profile_in_short(unet, [vae])
    assert profile.source == "short"
    assert not profile.beside_kinds("64x64")
    decode = profile.decode("64x64")
    assert decode
    assert decode.chunk_ms == (5.0,) * 4


def test_a_profile_serves_the_workers_it_was_made_for() -> None:
    unet = make_worker("unet", "u", "u-1")
    assert matching_profile([PROFILE], unet) is PROFILE
    other = Profile(
        model_id="m",
        device="cpu",
        dtype="bfloat16",
        threads=2,
        slots=PROFILE.slots,
        decodes=(),
    )
    assert matching_profile([other], unet) is None


def test_a_profile_of_a_much_slower_or_faster_machine_is_stale() -> None:
    unet = make_worker("unet", "u", "u-1")
    for factor, is_used in ((0.2, False), (0.7, True), (1.5, True), (5.0, False)):
        step_ms = {rows: ms * factor for rows, ms in unet.step_ms.items()}
        found = matching_profile([PROFILE], replace(unet, step_ms=step_ms))
        assert (found is PROFILE) == is_used


def test_drift_follows_a_lasting_change_and_shrugs_at_an_outlier() -> None:
    drift = Drift()
    for _ in range(200):
        predicted = 10.0 * drift.factor(ALONE)
        drift = drift.after(ALONE, predicted_ms=predicted, measured_ms=15.0)
    assert drift.factor(ALONE) == pytest.approx(1.5, rel=0.01)
    shocked = drift.after(ALONE, predicted_ms=15.0, measured_ms=15_000.0)
    assert shocked.factor(ALONE) <= drift.factor(ALONE) * MAX_RATIO**WEIGHT * 1.001
