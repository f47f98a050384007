"""One request that can't run fails alone, whatever shares its slot."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from services.unet_worker.denoising.denoiser import SlotResult
from services.unet_worker.denoising.isolation import run_isolated
from shared.messages import RowReport, SlotRow


def make_rows(count: int) -> list[SlotRow]:
    return [SlotRow(request_id=f"r{n}", attempt="1-1", step_index=0) for n in range(count)]


def run_without(bad: set[str], error: Exception, *, most: int = 99):
    calls: list[int] = []

    def run(rows: Sequence[SlotRow]) -> SlotResult:
        calls.append(len(rows))
        if len(rows) > most or bad & {row.request_id for row in rows}:
            raise error
        reports = tuple(
            RowReport(request_id=r.request_id, attempt=r.attempt, has_run=True, next_step_index=1)
            for r in rows
        )
        return SlotResult(rows=reports, num_unet_rows=len(rows))

    return run, calls


def test_a_slot_that_runs_is_run_once() -> None:
    run, calls = run_without(set(), RuntimeError())
    assert run_isolated(run, make_rows(5)).num_unet_rows == 5
    assert calls == [5]


@pytest.mark.parametrize("bad", [{"r0"}, {"r4"}, {"r1", "r2"}])
def test_only_the_requests_that_can_not_run_fail(bad: set[str]) -> None:
    run, _ = run_without(bad, RuntimeError("[enforce fail] can't allocate memory"))
    result = run_isolated(run, make_rows(5))
    assert {failure.request_id for failure in result.failures} == bad
    assert {failure.code for failure in result.failures} == {"out_of_memory"}
    assert [row.request_id for row in result.rows] == [f"r{n}" for n in range(5)]
    assert {row.request_id for row in result.rows if row.has_run} == {
        f"r{n}" for n in range(5)
    } - bad


def test_a_batch_too_large_for_the_memory_runs_in_parts() -> None:
    run, _ = run_without(set(), MemoryError(), most=2)
    result = run_isolated(run, make_rows(7))
    assert not result.failures
    assert result.num_unet_rows == 7


def test_an_error_of_another_kind_says_what_it_was() -> None:
    run, _ = run_without({"r0"}, RuntimeError("shape mismatch"))
    (failure,) = run_isolated(run, make_rows(1)).failures
    assert failure.code == "step_failed"
    assert "shape mismatch" in failure.reason
