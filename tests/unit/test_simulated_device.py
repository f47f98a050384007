"""A simulated device's parts, chunks and commits beside each other."""

from __future__ import annotations

import pytest

from services.scheduler.simulation.clock import Clock
from services.scheduler.simulation.device import FORWARD, WAITING, Device
from services.scheduler.simulation.rates import Rates

TEN_MS = Rates(alone_ms=10.0, beside_ms=12.0)
TWENTY_MS = Rates(alone_ms=20.0, beside_ms=24.0)
COMMIT = Rates(alone_ms=10.0, beside_ms=10.0)


class Bench:
    """A device with two cores, and when each job was over, in ms."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.device = Device(self.clock, cores=2)
        self.over: dict[str, float] = {}
        self._begun_at = self.clock.now

    def begin(self, owner: str, rates: Rates, *, is_commit: bool = False) -> None:
        def note(_: float) -> None:
            self.over[owner] = (self.clock.now - self._begun_at) * 1000

        self.device.begin(owner, rates, note, threads=1, is_commit=is_commit)

    def run(self) -> dict[str, float]:
        while self.clock.step():
            pass
        return {owner: round(ms, 6) for owner, ms in self.over.items()}


def test_parts_that_wait_go_on_once_the_chunk_is_over() -> None:
    bench = Bench()
    bench.begin(FORWARD, TWENTY_MS)
    bench.begin(WAITING, TEN_MS)
    bench.begin("vae", Rates(alone_ms=5.0, beside_ms=6.0))
    # 6 of the 24 ms that the forward takes beside chunks, then three quarters of 20 ms.
    assert bench.run() == {"vae": 6.0, WAITING: 16.0, FORWARD: 21.0}


def test_or_once_the_others_are_done() -> None:
    bench = Bench()
    bench.begin(FORWARD, TEN_MS)
    bench.begin(WAITING, TEN_MS)
    bench.begin("vae", Rates(alone_ms=50.0, beside_ms=60.0))
    over = bench.run()
    assert (over[FORWARD], over[WAITING]) == (12.0, 24.0)


def test_a_commit_stops_nobody_but_takes_its_share_of_the_cores() -> None:
    bench = Bench()
    bench.begin(FORWARD, TEN_MS)
    bench.begin(WAITING, TEN_MS)
    bench.begin("commit", COMMIT, is_commit=True)
    assert bench.run() == {FORWARD: 15.0, WAITING: 15.0, "commit": 15.0}


def test_beside_a_slot_on_one_core_a_commit_has_the_other() -> None:
    bench = Bench()
    bench.begin(FORWARD, TEN_MS)
    bench.begin("commit", COMMIT, is_commit=True)
    assert bench.run()[FORWARD] == pytest.approx(10.0)
