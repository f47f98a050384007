"""A forward's threads, and its parts, while decode chunks come and go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from services.unet_worker.giving_way import TURN, GivingWay, Turns, watch

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


class Side:
    """One of a forward's parts: so many layers, counted as they are passed."""

    def __init__(self, part: int, turns: Turns, num_layers: int, at_layer: Callable[[int], None]):
        self.passed = 0
        self._turns = turns
        self._part = part
        self._num_layers = num_layers
        self._at_layer = at_layer
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        x = torch.zeros(1)
        with self._turns.taken_by(self._part):
            for _ in range(self._num_layers):
                torch.ops.synerdiff.give_way(x)
                self.passed += 1
                self._at_layer(self._part)

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set while chunks run."""
    event = threading.Event()
    monkeypatch.setattr(GivingWay, "running", GivingWay(event.is_set))
    return event


def test_parts_take_turns_while_chunks_run(beside: threading.Event) -> None:
    beside.set()
    turns, seen = Turns(2, 1, beside.is_set), list[int]()

    def at_layer(part: int) -> None:
        seen.append(part)
        time.sleep(0.0005)

    sides = [Side(part, turns, 10 * TURN, at_layer) for part in (0, 1)]
    for side in sides:
        side.join()
    lead = [abs(2 * seen[:i].count(0) - i) for i in range(len(seen))]
    assert max(lead) <= 2 * TURN
    changes = sum(a != b for a, b in pairwise(seen))
    assert changes <= 4 * 10, "they run one at a time, not side by side"


def test_a_part_that_waits_goes_on_once_the_chunks_are_over(beside: threading.Event) -> None:
    beside.set()
    turns = Turns(2, 1, beside.is_set)  # the other one never begins
    side = Side(1, turns, 3 * TURN, lambda _: None)
    time.sleep(0.05)
    assert side.passed < TURN
    beside.clear()
    side.join()
    assert side.passed == 3 * TURN


def test_a_part_that_fails_keeps_nobody_waiting(beside: threading.Event) -> None:
    beside.set()
    turns = Turns(2, 1, beside.is_set)
    side = Side(1, turns, 3 * TURN, lambda _: None)
    with pytest.raises(ValueError, match="no"), turns.taken_by(0):
        raise ValueError("no")
    side.join()
    assert side.passed == 3 * TURN


def test_as_many_parts_go_on_as_there_are_threads_for(beside: threading.Event) -> None:
    beside.set()
    turns = Turns(3, 2, beside.is_set)  # the first never begins, the others may both go on
    sides = [Side(part, turns, TURN, lambda _: None) for part in (1, 2)]
    sides[0].join()
    assert sides[0].passed == TURN
    beside.clear()
    sides[1].join()
