"""Forwards in parts: the same noise from the same rows, on as many threads as there are."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from services.unet_worker.backends.cpu.backend import CpuBackend
from services.unet_worker.backends.cpu.giving_way import GivingWay
from services.unet_worker.backends.measure import zero_inputs
from services.unet_worker.families.loading import load_family
from services.unet_worker.families.protocol import network_inputs
from shared.messages import SlotShape

pytestmark = pytest.mark.usefixtures("two_threads")

SIZE = (64, 64)

EVEN = SlotShape(threads_beside=1, waiting_share=0.5)


@pytest.fixture
def backend(tiny_model_folder: Path) -> CpuBackend:
    backend = CpuBackend(load_family(tiny_model_folder, device="cpu", dtype="float32"))
    assert backend.prepare()
    return backend


def _inputs(backend: CpuBackend, rows: int) -> list[torch.Tensor]:
    family = backend._family
    inputs = network_inputs(family, *zero_inputs(family, rows, *SIZE))
    return [torch.randn_like(tensor) for tensor in inputs]


class Parts:
    """In place of a recorded graph: notes each call's rows and threads."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, *inputs: torch.Tensor) -> Any:
        call = (len(inputs[0]), torch.get_num_threads(), threading.get_ident())
        self.calls.append(call)
        return self.graph(*inputs)


@pytest.fixture
def parts(backend: CpuBackend) -> Parts:
    graphs = backend.forward._graphs
    [(size, graph)] = graphs.items()
    parts = graphs[size] = Parts(graph)
    return parts


@pytest.mark.parametrize(
    ("rows", "threads", "expected"),
    [(1, 2, [(1, 2)]), (2, 2, [(1, 1), (1, 1)]), (7, 2, [(4, 1), (3, 1)]), (7, 1, [(7, 1)])],
)
def test_rows_are_split_over_the_threads(
    backend: CpuBackend, parts: Parts, rows: int, threads: int, expected: list[tuple[int, int]]
) -> None:
    inputs = _inputs(backend, rows)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        noise = backend.forward(*inputs)
        found = sorted(((rows, threads) for rows, threads, _ in parts.calls), reverse=True)
        assert found == expected
        assert len({thread for _, _, thread in parts.calls}) == len(expected)
        assert_close(noise, parts.graph(*inputs))
    assert torch.get_num_threads() == threads


def test_more_threads_than_rows_are_shared_by_them(backend: CpuBackend, parts: Parts) -> None:
    torch.set_num_threads(7)
    with torch.inference_mode():
        backend.forward(*_inputs(backend, 3))
    assert [threads for _, threads, _ in parts.calls] == [2, 2, 2]


def test_without_splitting_each_operation_has_all_threads(
    backend: CpuBackend, parts: Parts
) -> None:
    backend.forward._splits_rows = False
    with torch.inference_mode():
        backend.forward(*_inputs(backend, 4))
    assert [call[:2] for call in parts.calls] == [(4, 2)]


def test_a_size_without_a_graph_is_not_split(backend: CpuBackend, parts: Parts) -> None:
    family = backend._family
    inputs = network_inputs(family, *zero_inputs(family, 2, 64, 96))
    with torch.inference_mode():
        assert backend.forward(*inputs).shape == inputs[0].shape
    assert not parts.calls


def test_threads_held_are_for_forwards_alone(backend: CpuBackend, parts: Parts) -> None:
    with torch.inference_mode(), backend.forward.holding_threads():
        assert torch.get_num_threads() == 1
        backend.forward(*_inputs(backend, 1))
        assert torch.get_num_threads() == 1
    assert [call[:2] for call in parts.calls] == [(1, 2)]
    assert torch.get_num_threads() == 2


def test_a_failing_part_fails_the_forward_once_all_are_over(
    backend: CpuBackend, parts: Parts
) -> None:
    main, over = threading.get_ident(), threading.Event()

    def fail(*inputs: torch.Tensor) -> torch.Tensor:
        if threading.get_ident() == main:
            raise RuntimeError("no memory")
        threading.Event().wait(0.05)
        over.set()
        return inputs[0]

    parts.graph = fail
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no memory"):
        backend.forward(*_inputs(backend, 2))
    assert over.is_set()
    assert torch.get_num_threads() == 2


def test_the_last_part_waits_for_chunks_and_the_result_is_the_same(backend: CpuBackend) -> None:
    inputs, asked_by = _inputs(backend, 4), set()

    def has_chunks_beside() -> bool:
        asked_by.add(threading.get_ident())
        return True

    with torch.inference_mode():
        expected = backend.forward(*inputs)
        noise = GivingWay(has_chunks_beside).run(
            lambda: backend.forward(*inputs), threads=2, shape=EVEN
        )
    assert torch.equal(noise, expected)
    assert len(asked_by) == 1
    assert threading.get_ident() not in asked_by
    assert torch.get_num_threads() == 2


def test_the_part_that_waits_for_chunks_is_the_smaller_one(
    backend: CpuBackend, parts: Parts
) -> None:
    inputs, giving_way = _inputs(backend, 4), GivingWay(lambda: False)
    for share, expected in ((0.25, [3, 1]), (0.0, [4])):
        parts.calls.clear()
        with torch.inference_mode():
            giving_way.run(
                lambda: backend.forward(*inputs),
                threads=2,
                shape=SlotShape(threads_beside=1, waiting_share=share),
            )
        assert sorted((call[0] for call in parts.calls), reverse=True) == expected
        assert {call[1] for call in parts.calls} == {1}
