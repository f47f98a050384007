"""A forward's threads while decode chunks come and go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from services.unet_worker.giving_way import GivingWay, watch


class Watched(torch.nn.Module):
    """Three layers that note on how many threads they run, and what happens ahead of each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.LayerNorm(2) for _ in range(3))
        self.threads: list[int] = []
        watch(self)
        for layer in self.layers:
            layer.register_forward_hook(lambda *_: self.threads.append(torch.get_num_threads()))

    def forward(self) -> None:
        for layer in self.layers:
            layer(torch.zeros(1, 2))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_forward_gives_way_while_chunks_run_and_takes_its_threads_back() -> None:
    unet, chunks = Watched(), iter([False, True, False])
    GivingWay(lambda: next(chunks)).run(unet, threads=2, threads_beside=1)
    assert unet.threads == [2, 1, 2]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_recorded_forward_gives_way_too() -> None:
    layers = torch.nn.Sequential(*(torch.nn.LayerNorm(2) for _ in range(3))).eval()
    watch(layers)
    graph = torch.jit.trace(layers, torch.zeros(1, 2))
    threads: list[int] = []

    def has_chunks_beside() -> bool:
        threads.append(torch.get_num_threads())
        return True

    x = torch.randn(4, 2)
    result = GivingWay(has_chunks_beside).run(lambda: graph(x), threads=2, threads_beside=1)
    assert threads == [2, 1, 1]
    torch.testing.assert_close(result, layers(x))


def test_the_threads_are_those_of_before_once_it_is_over() -> None:
    unet = Watched()
    giving_way = GivingWay(lambda: True)
    assert giving_way.run(lambda: unet() or "done", threads=2, threads_beside=1) == "done"
    assert unet.threads == [1, 1, 1]
    assert torch.get_num_threads() == 2


def test_they_are_those_of_before_after_a_failure_too() -> None:
    unet = Watched()

    def fail() -> None:
        unet()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        GivingWay(lambda: True).run(fail, threads=2, threads_beside=1)
    assert torch.get_num_threads() == 2


def test_without_threads_for_beside_nobody_asks_for_chunks() -> None:
    unet = Watched()
    GivingWay(lambda: pytest.fail("asked")).run(unet, threads=2, threads_beside=0)
    unet()
    assert unet.threads == [2] * 6
