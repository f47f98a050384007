"""How much work is ahead of a model's workers, and what more would add: by what serving takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Of one model, all as wall time of its workers together.

    A picture asked for now is predicted after backlog_ms + forwards * rows * row_ms + decode_ms +
    overhead_ms.
    """

    backlog_ms: float
    """Until everything accepted so far is done."""
    row_ms: float
    """That one more row's forward adds, at the default size and in full slots."""
    decode_ms: float
    """That one more decode of the default size adds."""
    overhead_ms: float
    """Of a request's other parts: encoding its prompt."""
