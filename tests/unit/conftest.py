"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors are computed on one thread."""
    yield from _threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Tensors are computed on two threads."""
    yield from _threads(2)


def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)
