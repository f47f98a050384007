"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def two_threads() -> None:
    """Tensors are computed on two threads."""
    torch.set_num_threads(2)
