"""A device that is slower now than its profile says."""

from __future__ import annotations

import pytest

from bench.device_speed import device_slowdown, slowdowns_by_rows, slowed_down
from services.scheduler.devices.profile import DecodeTiming, Profile, SlotKind, SlotTiming

PROFILE = Profile(
    model_id="tiny",
    device="cpu",
    dtype="float32",
    threads=2,
    encode_ms=3.0,
    slots=(
        SlotTiming(key="64x64", kind=SlotKind(unet_threads=1), step_ms={1: 12, 4: 30, 24: 150}),
        SlotTiming(key="64x64", kind=SlotKind(unet_threads=2), step_ms={1: 10, 4: 20, 24: 80}),
    ),
    decodes=(DecodeTiming(key="64x64", threads=2, chunk_ms=(4.0, 5.0)),),
)


class SlowStack:
    """Small slots take 1.5 times as long as profiled, others 1.1 times."""

    def slot_ms(self, *, size: str, rows: int, threads: int) -> float:
        """As the protocol says."""
        assert (size, threads) == ("64x64", 2)
        return {4: 30.0, 24: 88.0}[rows]


def test_the_slowdown_is_of_the_fastest_slots_alone() -> None:
    assert device_slowdown(SlowStack(), PROFILE) == pytest.approx(1.1)
    assert slowdowns_by_rows(SlowStack(), PROFILE) == pytest.approx({4: 1.5, 24: 1.1})


def test_what_lies_between_measured_sizes_is_slowed_down_accordingly() -> None:
    slow = slowed_down(PROFILE, {4: 1.5, 14: 1.1})
    assert slow.slots[1].step_ms == pytest.approx({1: 15, 4: 30, 24: 88})
    assert slow.decodes[0].chunk_ms == pytest.approx((4.4, 5.5))
    assert slow.encode_ms == pytest.approx(4.5)
