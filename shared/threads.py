"""On how many CPU threads the calling thread computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def set_threads(threads: int) -> None:
    """Compute on so many threads from now on."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def running_on(threads: int) -> Iterator[None]:
    """Compute on so many threads meanwhile."""
    before = torch.get_num_threads()
    set_threads(threads)
    try:
        yield
    finally:
        set_threads(before)
