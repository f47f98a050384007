"""A forward's threads, and its parts, while decode chunks come and go."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from services.unet_worker.backends.cpu.giving_way import GivingWay, Parts, even_sizes, watch
from shared.messages import NO_ROOM, SlotShape

EVEN = SlotShape(threads_beside=1, waiting_share=0.5)

pytestmark = pytest.mark.usefixtures("two_threads")


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


def test_a_forward_gives_way_while_chunks_run_and_takes_its_threads_back() -> None:
    unet, chunks = Watched(), iter([False, True, False])
    GivingWay(lambda: next(chunks)).run(unet, threads=2, shape=EVEN)
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
    result = GivingWay(has_chunks_beside).run(lambda: graph(x), threads=2, shape=EVEN)
    assert threads == [2, 1, 1]
    torch.testing.assert_close(result, layers(x))


def test_the_threads_are_those_of_before_once_it_is_over() -> None:
    unet = Watched()
    giving_way = GivingWay(lambda: True)
    assert giving_way.run(lambda: unet() or "done", threads=2, shape=EVEN) == "done"
    assert unet.threads == [1, 1, 1]
    assert torch.get_num_threads() == 2


def test_they_are_those_of_before_after_a_failure_too() -> None:
    unet = Watched()

    def fail() -> None:
        unet()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        GivingWay(lambda: True).run(fail, threads=2, shape=EVEN)
    assert torch.get_num_threads() == 2


def test_without_threads_for_beside_nobody_asks_for_chunks() -> None:
    unet = Watched()
    GivingWay(lambda: pytest.fail("asked")).run(unet, threads=2, shape=NO_ROOM)
    unet()
    assert unet.threads == [2] * 6


class Side:
    """One of a forward's parts: so many layers, counted as they are passed."""

    def __init__(self, part: int, parts: Parts, num_layers: int = 3):
        self.passed = 0
        self._part = part
        self._parts = parts
        self._num_layers = num_layers
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        x = torch.zeros(1)
        with self._parts.running(self._part):
            for _ in range(self._num_layers):
                torch.ops.synerdiff.give_way(x)
                self.passed += 1

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set while chunks run."""
    event = threading.Event()
    monkeypatch.setattr(GivingWay, "running", GivingWay(event.is_set))
    return event


def test_the_first_parts_go_on_beside_chunks_and_the_others_wait(beside: threading.Event) -> None:
    beside.set()
    parts = Parts(3, 2, beside.is_set)
    waiting = Side(2, parts)
    time.sleep(0.05)
    assert not waiting.passed
    beside.clear()
    waiting.join()
    assert waiting.passed == 3


def test_a_part_that_waits_takes_the_place_of_one_that_is_done(beside: threading.Event) -> None:
    beside.set()
    parts = Parts(2, 1, beside.is_set)
    waiting = Side(1, parts)
    time.sleep(0.05)
    assert not waiting.passed
    for side in (Side(0, parts), waiting):
        side.join()
        assert side.passed == 3


def test_a_part_that_fails_keeps_nobody_waiting(beside: threading.Event) -> None:
    beside.set()
    parts = Parts(2, 1, beside.is_set)
    side = Side(1, parts)
    with pytest.raises(ValueError, match="no"), parts.running(0):
        raise ValueError("no")
    side.join()
    assert side.passed == 3


@pytest.mark.parametrize(
    ("share", "sizes"),
    [(0.0, [3, 3, 3]), (0.25, [3, 2, 2, 2]), (2 / 9, [3, 2, 2, 2])],
)
def test_parts_that_wait_come_last_and_have_their_share_of_the_rows(
    share: float, sizes: list[int]
) -> None:
    giving_way = GivingWay(lambda: False)
    found = giving_way.run(
        lambda: giving_way.part_sizes(9, 4),
        threads=4,
        shape=SlotShape(threads_beside=3, waiting_share=share),
    )
    assert found == sizes


def test_rows_are_split_as_even_as_can_be() -> None:
    assert even_sizes(7, 3) == [3, 2, 2]
    assert even_sizes(2, 3) == [1, 1]
