"""Turns by time: who had less of the device is next."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.planning.turns import FairTurns


def serve(
    turns: FairTurns[str], slot_ms: dict[str, float], count: int
) -> tuple[FairTurns[str], Counter[str]]:
    """Give so many turns; return the turns and what each key had of the device, in ms."""
    served: Counter[str] = Counter()
    for _ in range(count):
        key = min(slot_ms, key=lambda key: (turns.start_ms(key), key))
        turns = turns.after(key, slot_ms[key])
        served[key] += int(slot_ms[key])
    return turns, served


@given(
    slot_ms=st.dictionaries(st.text(max_size=2), st.integers(1, 1_000), min_size=1, max_size=5),
    count=st.integers(1, 200),
)
def test_keys_that_always_have_work_get_equal_time(slot_ms: dict[str, float], count: int) -> None:
    _, served = serve(FairTurns(), slot_ms, count)
    had = [served[key] for key in slot_ms]
    assert max(had) - min(had) <= max(slot_ms.values())


def test_a_key_that_was_away_has_no_claim_to_what_it_has_missed() -> None:
    turns, _ = serve(FairTurns(), {"a": 10.0, "b": 10.0}, 4)
    turns, _ = serve(turns, {"a": 10.0}, 100)
    _, served = serve(turns, {"a": 10.0, "b": 10.0}, 10)
    assert abs(served["a"] - served["b"]) <= 10


def test_what_lies_behind_is_forgotten() -> None:
    turns: FairTurns[str] = FairTurns()
    for number in range(100):
        turns = turns.after(f"once{number}", 1.0)
        turns = turns.after("always", 10.0)
    assert len(turns.finished_ms) <= 3
