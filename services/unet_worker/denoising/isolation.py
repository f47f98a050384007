"""A slot that fails as a whole is run again in halves, so that only what can't run fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from services.unet_worker.denoising.denoiser import SlotResult
from shared.errors import SynerDiffError
from shared.messages import RowFailure, RowReport, SlotRow

RunRows = Callable[[Sequence[SlotRow]], SlotResult]


def run_isolated(run: RunRows, rows: Sequence[SlotRow]) -> SlotResult:
    """The result of `run(rows)`; where it raises, that of its halves, down to single requests.

    run: changes nothing when it raises (`Denoiser.run`). A request that fails alone is reported as
    failed: most likely its size does not fit the memory.
    """
    try:
        return run(rows)
    except (RuntimeError, MemoryError, SynerDiffError) as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            return _failed(rows[0], error)
    middle = len(rows) // 2
    first, second = (run_isolated(run, half) for half in (rows[:middle], rows[middle:]))
    return SlotResult(
        rows=first.rows + second.rows,
        finished=first.finished + second.finished,
        failures=first.failures + second.failures,
        num_unet_rows=first.num_unet_rows + second.num_unet_rows,
    )


def _failed(row: SlotRow, error: Exception) -> SlotResult:
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in str(error)
    code = "out_of_memory" if is_memory else "step_failed"
    reason = (
        "The picture's size does not fit the worker's memory."
        if is_memory
        else f"The step failed: {error}"
    )
    report = RowReport(
        request_id=row.request_id, attempt=row.attempt, has_run=False, next_step_index=-1
    )
    failure = RowFailure(request_id=row.request_id, attempt=row.attempt, code=code, reason=reason)
    return SlotResult(rows=(report,), failures=(failure,))
