"""Orders are let in by when their pictures would come."""

from __future__ import annotations

import pytest
from fake_backend import MODEL
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.admission import (
    ANSWER_FRACTION,
    Acceptance,
    Capacity,
    Ledger,
    WaitLimits,
    check_admission,
    order_work_s,
    read_capacities,
    wait_s,
)
from services.gateway.order import ImageOrder, limits_of, order_images
from services.gateway.validation import GenerationBody
from shared.errors import OverloadedError
from shared.settings import GatewaySettings

CAPACITY = Capacity(backlog_ms=1_000.0, row_ms=4.0, decode_ms=20.0, overhead_ms=2.0)
LIMITS = WaitLimits(max_wait_s=7.5, timeout_s=15.0)
SECONDS = st.floats(0, 100)


def order(**fields: object) -> ImageOrder:
    body = GenerationBody.model_validate({"prompt": "a cat", **fields})
    return order_images(body, limits_of(MODEL, GatewaySettings()), random_seed=1)


def retry_after_s(
    *, start_s: float, work_s: float, deadline_ms: int = 0, limits: WaitLimits = LIMITS
) -> float | None:
    """None if let in."""
    try:
        check_admission(start_s=start_s, work_s=work_s, deadline_ms=deadline_ms, limits=limits)
    except OverloadedError as error:
        return error.retry_after_s
    return None


@pytest.mark.parametrize(
    ("fields", "work_ms"),
    [
        ({"num_inference_steps": 10}, 10 * 2 * 4 + 20 + 2),
        ({"num_inference_steps": 10, "guidance_scale": 1.0}, 10 * 4 + 20 + 2),
        ({"num_inference_steps": 10, "n": 3}, 3 * (10 * 2 * 4 + 20 + 2)),
        ({"num_inference_steps": 10, "size": "256x256"}, 4 * (10 * 2 * 4 + 20) + 2),
    ],
)
def test_work_counts_rows_decodes_and_area(fields: dict[str, object], work_ms: float) -> None:
    assert order_work_s(order(**fields), CAPACITY) == pytest.approx(work_ms / 1000)


def test_the_backlog_shrinks_as_time_passes_and_never_below_nothing() -> None:
    assert wait_s(CAPACITY, 100.0, [], 100.0) == pytest.approx(1.0)
    assert wait_s(CAPACITY, 100.0, [], 100.4) == pytest.approx(0.6)
    assert wait_s(CAPACITY, 100.0, [], 105.0) == 0.0


def test_what_was_accepted_since_is_ahead_too_from_when_it_came() -> None:
    ledger = Ledger()
    for at, work_s in ((100.5, 0.2), (103.0, 0.5)):
        ledger.confirm(ledger.add("fake", work_s, at), at)
    ledger.confirm(ledger.add("other", 9.0, 100.5), 100.5)
    assert wait_s(CAPACITY, 100.0, ledger.since("fake", 100.0), 103.1) == pytest.approx(0.4)


def test_the_ledger_forgets_what_a_later_status_shows() -> None:
    ledger = Ledger()
    shown, pending, withdrawn = (ledger.add("fake", 1.0, 100.0) for _ in range(3))
    ledger.confirm(shown, 100.1)
    ledger.withdraw(withdrawn)
    assert ledger.since("fake", 100.0) == [shown, pending]
    assert ledger.since("fake", 100.2) == [pending]
    ledger.confirm(pending, 100.3)
    assert ledger.since("fake", 100.2) == [pending]
    assert ledger.since("fake", 100.4) == []


def test_an_order_is_let_in_while_its_start_lies_within_the_wait() -> None:
    assert retry_after_s(start_s=7.4, work_s=0.3) is None
    assert retry_after_s(start_s=9.5, work_s=0.3) == pytest.approx(2.0)


def test_an_order_that_could_not_be_answered_in_time_is_refused() -> None:
    assert retry_after_s(start_s=5.0, work_s=6.5) is None
    assert retry_after_s(start_s=5.0, work_s=9.0) == pytest.approx(2.0)


def test_a_deadline_counts_to_the_finish_and_replaces_the_wait() -> None:
    assert retry_after_s(start_s=1.0, work_s=0.3, deadline_ms=1_000) == pytest.approx(0.3)
    assert retry_after_s(start_s=9.0, work_s=0.3, deadline_ms=10_000) is None
    assert retry_after_s(start_s=12.5, work_s=0.5, deadline_ms=60_000) == pytest.approx(1.0)


@given(work_s=SECONDS, deadline_ms=st.integers(0, 100_000))
def test_with_nothing_ahead_any_order_is_let_in(work_s: float, deadline_ms: int) -> None:
    assert retry_after_s(start_s=0.0, work_s=work_s, deadline_ms=deadline_ms) is None


@given(
    start_s=SECONDS,
    work_s=SECONDS,
    deadline_ms=st.integers(0, 100_000),
    max_wait_s=SECONDS,
    timeout_s=st.floats(0.1, 100),
)
def test_who_waits_as_told_is_let_in_and_nobody_later_than_promised(
    start_s: float, work_s: float, deadline_ms: int, max_wait_s: float, timeout_s: float
) -> None:
    limits = WaitLimits(max_wait_s=max_wait_s, timeout_s=timeout_s)
    retry_s = retry_after_s(start_s=start_s, work_s=work_s, deadline_ms=deadline_ms, limits=limits)
    if retry_s is None and start_s > 0:
        assert start_s + work_s <= ANSWER_FRACTION * timeout_s + 1e-6
        assert start_s + work_s <= deadline_ms / 1000 + 1e-6 or not deadline_ms
        assert start_s <= max_wait_s or deadline_ms
    if retry_s is not None:
        later_s = max(0.0, start_s - retry_s - 1e-6)
        again = retry_after_s(
            start_s=later_s, work_s=work_s, deadline_ms=deadline_ms, limits=limits
        )
        assert again is None


@given(
    backlog_ms=st.floats(0, 10_000),
    entries=st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), max_size=8),
    now=st.floats(0, 20),
)
def test_work_ahead_is_at_most_all_of_it_and_at_least_what_time_can_not_have_done(
    backlog_ms: float, entries: list[tuple[float, float]], now: float
) -> None:
    capacity = Capacity(backlog_ms=backlog_ms, row_ms=1.0, decode_ms=1.0, overhead_ms=0.0)
    accepted = [
        Acceptance(model_id="fake", work_s=work_s, accepted_at=min(at, now))
        for at, work_s in entries
    ]
    total_s = backlog_ms / 1000 + sum(work_s for _, work_s in entries)
    ahead_s = wait_s(capacity, 0.0, accepted, now)
    assert max(0.0, total_s - now) - 1e-9 <= ahead_s <= total_s + 1e-9


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        {"a": None},
        {"a": {"row_ms": "fast"}},
        {"a": {"row_ms": float("nan")}},
        {"a": {"row_ms": 1.0, "backlog_ms": float("inf")}},
        {"a": {"row_ms": -1.0}},
        {"a": {"row_ms": 0.0}},
        {"a": [1, 2]},
    ],
)
def test_a_capacity_that_makes_no_sense_counts_as_unknown(value: object) -> None:
    assert read_capacities(value) == {}


def test_capacities_are_read_by_model() -> None:
    fields = {"backlog_ms": 1_000, "row_ms": 4.0, "decode_ms": 20.0, "overhead_ms": 2.0}
    assert read_capacities({"a": fields, "b": None}) == {"a": CAPACITY}
