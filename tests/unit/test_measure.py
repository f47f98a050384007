"""Which slots a worker measures at its start."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.unet_worker import measure
from services.unet_worker.model import DiffusionModel, load_model

COUNTS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> DiffusionModel:
    return load_model(tiny_model_folder, device="cpu", dtype="float32")


def _measured(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, durations_s: list[float]
) -> dict[int, float]:
    """Slots that take so long, one measurement after the other."""
    left = iter(durations_s)
    monkeypatch.setattr(measure, "_forward_zeros", lambda *_: None)
    monkeypatch.setattr(measure, "_forward_s", lambda *_: next(left))
    return measure.measure(model, COUNTS, num_repeats=1)


def test_larger_slots_are_measured_as_long_as_rows_get_cheaper(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _measured(model, monkeypatch, [10e-3, 12e-3, 20e-3, 36e-3])
    assert found == pytest.approx({1: 10, 2: 12, 4: 20, 8: 36})


def test_the_second_without_gain_is_the_last(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _measured(model, monkeypatch, [10e-3, 21e-3, 22e-3, 41e-3, 42e-3])
    assert found == pytest.approx({1: 10, 2: 21, 4: 41})


def test_one_without_gain_may_be_noise(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _measured(model, monkeypatch, [10e-3, 21e-3, 22e-3, 24e-3, 40e-3])
    assert found == pytest.approx({1: 10, 2: 21, 4: 24, 8: 40})


def test_of_long_forwards_the_first_without_gain_is_the_last(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _measured(model, monkeypatch, [10.0, 21.0, 22.0])
    assert found == pytest.approx({1: 10_000, 2: 21_000})


def test_a_slow_moment_does_not_end_it(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _measured(model, monkeypatch, [10e-3, 30e-3, 12e-3, 20e-3, 36e-3])
    assert found == pytest.approx({1: 10, 2: 12, 4: 20, 8: 36})
