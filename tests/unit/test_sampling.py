"""Which samples of a measurement count."""

from __future__ import annotations

from itertools import count

import pytest

from shared import worker
from shared.worker import sample_for


@pytest.mark.parametrize(
    ("window_s", "expected"),
    [(0.0, [0]), (1.5, [1]), (2.5, [1]), (4.5, [1, 2, 3])],
    ids=["at least one", "not the first of two", "nor the last of three", "nor of five"],
)
def test_the_first_and_the_last_sample_are_left_out_where_others_are_left(
    monkeypatch: pytest.MonkeyPatch, window_s: float, expected: list[int]
) -> None:
    clock, samples = count(), count()
    monkeypatch.setattr(worker.time, "perf_counter", lambda: float(next(clock)))
    assert sample_for(window_s, lambda: next(samples)) == expected
