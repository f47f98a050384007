from __future__ import annotations

from dataclasses import dataclass

import pytest

from services.scheduler.store_clock import StoreClock
from shared.errors import EpochEndedError


@dataclass
class Clocks:
    """Stands in for a connection: the store's clock, and this process's monotonic one."""

    store: float = 1_000.0
    here: float = 50.0
    latency_s: float = 0.0

    async def time(self) -> tuple[int, int]:
        self.here += self.latency_s / 2
        answer = int(self.store), round(self.store % 1 * 1e6)
        self.here += self.latency_s / 2
        return answer

    def monotonic(self) -> float:
        return self.here


async def looked(clocks: Clocks) -> StoreClock:
    clock = StoreClock(clocks, clocks.monotonic)  # type: ignore[arg-type]
    await clock.look()
    return clock


async def test_it_runs_on_the_monotonic_clock_between_looks() -> None:
    clocks = Clocks()
    clock = await looked(clocks)
    assert clock.now() == 1_000.0
    clocks.here += 7.0
    assert clock.now() == 1_007.0


async def test_it_never_goes_backwards() -> None:
    clocks = Clocks()
    clock = await looked(clocks)
    clocks.here += 7.0
    assert clock.now() == 1_007.0
    clocks.store += 6.5  # the store's runs slower
    await clock.look()
    assert clock.now() == 1_007.0


async def test_a_slow_answer_is_not_believed() -> None:
    clocks = Clocks()
    clock = await looked(clocks)
    clocks.latency_s = 10.0
    await clock.look()
    assert clock.now() == 1_010.0


@pytest.mark.parametrize("step_s", [3_600.0, -3_600.0])
async def test_a_clock_that_was_set_ends_the_epoch(step_s: float) -> None:
    clocks = Clocks()
    clock = await looked(clocks)
    clocks.store += step_s
    with pytest.raises(EpochEndedError):
        await clock.look()


async def test_an_entrys_id_says_when_it_was_submitted() -> None:
    clock = await looked(Clocks())
    assert clock.submitted_at("999500-3") == 999.5
    assert clock.submitted_at(f"{2**63}-0") == 1_000.0
