"""Which slots a worker measures at its start."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.unet_worker.backends.eager import EagerBackend
from services.unet_worker.backends.measure import Stopwatch
from services.unet_worker.families.loading import load_family

COUNTS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def stopwatch(tiny_model_folder: Path) -> Stopwatch:
    family = load_family(tiny_model_folder, device="cpu", dtype="float32")
    return Stopwatch(family=family, backend=EagerBackend(family))


def _measured(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch, durations_s: list[float]
) -> dict[int, float]:
    """Slots that take so long, one measurement after the other."""
    left = iter(durations_s)
    seen: list[int] = []

    def forward_s(_: Stopwatch, num_rows: int, __: tuple[int, int]) -> float:
        is_first = not seen or seen[-1] != num_rows  # it warms up and isn't counted
        seen.append(num_rows)
        return 0.0 if is_first else next(left)

    monkeypatch.setattr(Stopwatch, "forward_s", forward_s)
    return stopwatch.measure(COUNTS, num_repeats=1)


def test_larger_slots_are_measured_as_long_as_rows_get_cheaper(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _measured(stopwatch, monkeypatch, [10e-3, 12e-3, 20e-3, 36e-3])
    assert found == pytest.approx({1: 10, 2: 12, 4: 20, 8: 36})


def test_the_second_without_gain_is_the_last(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _measured(stopwatch, monkeypatch, [10e-3, 21e-3, 22e-3, 41e-3, 42e-3])
    assert found == pytest.approx({1: 10, 2: 21, 4: 41})


def test_one_without_gain_may_be_noise(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _measured(stopwatch, monkeypatch, [10e-3, 21e-3, 22e-3, 24e-3, 40e-3])
    assert found == pytest.approx({1: 10, 2: 21, 4: 24, 8: 40})


def test_of_long_forwards_the_first_without_gain_is_the_last(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _measured(stopwatch, monkeypatch, [10.0, 21.0, 22.0])
    assert found == pytest.approx({1: 10_000, 2: 21_000})


def test_a_slow_moment_does_not_end_it(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _measured(stopwatch, monkeypatch, [10e-3, 30e-3, 12e-3, 20e-3, 36e-3])
    assert found == pytest.approx({1: 10, 2: 12, 4: 20, 8: 36})


def test_fewer_rows_are_not_said_to_take_longer_than_more(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _measured(stopwatch, monkeypatch, [290e-3, 12e-3, 20e-3, 36e-3, 9e-3])
    assert found == pytest.approx({1: 9, 2: 12, 4: 20, 8: 36})
    found = _measured(stopwatch, monkeypatch, [290e-3, 12e-3, 20e-3, 36e-3, 280e-3])
    assert found == pytest.approx({1: 12, 2: 12, 4: 20, 8: 36})
