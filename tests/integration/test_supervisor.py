from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from cli.service_log import LogLine
from cli.supervisor import Death, RestartPolicy, Service, Supervisor
from shared.errors import EXIT_CONFIGURATION

WAIT_S = 20.0
IMPATIENT = RestartPolicy(first_delay_s=0.02, max_delay_s=0.1, max_quick_deaths=3)
SLEEP = "import time; time.sleep(60)"


@dataclass(slots=True)
class Witness:
    lines: list[tuple[str, LogLine]] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    def on_log_line(self, service: str, line: LogLine) -> None:
        self.lines.append((service, line))

    def on_death(self, death: Death) -> None:
        self.deaths.append(death)

    def on_end(self, pid: int) -> None:
        self.ended.append(pid)


@pytest.fixture
def witness() -> Witness:
    return Witness()


@pytest.fixture
def supervisor(tmp_path: Path, witness: Witness) -> Supervisor:
    return Supervisor(log_folder=tmp_path, observer=witness, policy=IMPATIENT)


def script(name: str, source: str, *, stop_rank: int = 0, **environment: str) -> Service:
    return Service(
        name=name,
        command=(sys.executable, "-S", "-c", source),
        environment=dict(os.environ) | environment,
        stop_rank=stop_rank,
    )


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_service_that_is_killed_is_started_again_as_it_was(
    supervisor: Supervisor, witness: Witness
) -> None:
    source = (
        f"import os; print(os.environ['SYNERDIFF_WORKER_ID'], os.getpid(), flush=True); {SLEEP}"
    )
    await supervisor.start(script("unet-0", source, SYNERDIFF_WORKER_ID="unet-0"))
    await wait_until(lambda: witness.lines)
    first_pid = supervisor.pids()["unet-0"]

    os.kill(first_pid, signal.SIGKILL)
    await wait_until(lambda: len(witness.lines) == 2)
    second_pid = supervisor.pids()["unet-0"]
    await supervisor.stop(grace_s=5)

    assert [line.text for _, line in witness.lines] == [
        f"unet-0 {first_pid}",
        f"unet-0 {second_pid}",
    ]
    assert first_pid != second_pid
    assert [death.cause for death in witness.deaths] == ["killed by SIGKILL"]
    assert witness.ended == [first_pid, second_pid]


async def test_a_service_gives_way_to_others_as_far_as_it_is_told(
    supervisor: Supervisor, witness: Witness
) -> None:
    source = f"import os; print(os.nice(0), flush=True); {SLEEP}"
    await supervisor.start(replace(script("gateway", source), niceness=3))
    await wait_until(lambda: witness.lines)
    await supervisor.stop(grace_s=5)
    assert [line.text for _, line in witness.lines] == [str(min(os.nice(0) + 3, 19))]


async def test_a_service_that_keeps_ending_is_given_up_with_its_last_lines(
    supervisor: Supervisor, witness: Witness
) -> None:
    await supervisor.start(script("gateway", "print('no such model'); raise SystemExit(3)"))
    async with asyncio.timeout(WAIT_S):
        await supervisor.wait_given_up()
    await supervisor.stop(grace_s=5)

    assert len(witness.deaths) == IMPATIENT.max_quick_deaths
    assert witness.deaths[-1].restart_in_s is None
    assert witness.deaths[-1].cause == "exit code 3"
    assert witness.deaths[-1].last_lines[-1] == "no such model"
    assert supervisor.pids() == {}


async def test_a_service_that_says_that_another_start_would_end_alike_is_not_started_again(
    supervisor: Supervisor, witness: Witness
) -> None:
    await supervisor.start(script("unet-0", f"raise SystemExit({EXIT_CONFIGURATION})"))
    async with asyncio.timeout(WAIT_S):
        await supervisor.wait_given_up()
    await supervisor.stop(grace_s=5)
    (death,) = witness.deaths
    assert death.is_final
    assert death.restart_in_s is None


SIGBUS = "import os, signal; os.kill(os.getpid(), signal.SIGBUS)"


@pytest.mark.parametrize("source", [SIGBUS, f"raise SystemExit({EXIT_CONFIGURATION})", "1 / 0"])
async def test_deaths_under_a_hardship_are_waited_out_and_count_when_it_is_over(
    tmp_path: Path, witness: Witness, source: str
) -> None:
    hardship = "disk full"
    supervisor = Supervisor(
        log_folder=tmp_path, observer=witness, policy=IMPATIENT, find_hardship=lambda: hardship
    )
    await supervisor.start(script("gateway", source))
    await wait_until(lambda: len(witness.deaths) > 2 * IMPATIENT.max_quick_deaths)
    assert all(death.hardship == "disk full" for death in witness.deaths)
    assert all(death.restart_in_s is not None for death in witness.deaths)
    hardship = ""
    async with asyncio.timeout(WAIT_S):
        await supervisor.wait_given_up()
    await supervisor.stop(grace_s=5)


async def test_a_service_whose_log_cannot_be_written_runs_without(
    supervisor: Supervisor, witness: Witness, tmp_path: Path
) -> None:
    (tmp_path / "gateway.log" / "in the way").mkdir(parents=True)
    (tmp_path / "gateway.log.1" / "too").mkdir(parents=True)
    await supervisor.start(script("gateway", f"print('lost', flush=True); {SLEEP}"))
    pid = supervisor.pids()["gateway"]
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: supervisor.pids().get("gateway") not in {None, pid})
    await supervisor.stop(grace_s=5)
    assert [death.cause for death in witness.deaths] == ["killed by SIGKILL"]


async def test_services_stop_rank_by_rank(
    supervisor: Supervisor, witness: Witness, tmp_path: Path
) -> None:
    source = (
        "import signal, sys, time\n"
        "def leave(*_):\n"
        "    time.sleep(0.1)\n"
        "    print('bye', time.monotonic(), flush=True)\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "print('here', flush=True)\n"
        "time.sleep(60)"
    )
    for name, rank in (("redis", 3), ("gateway", 0), ("unet-0", 1)):
        await supervisor.start(script(name, source, stop_rank=rank))
    await wait_until(lambda: len(witness.lines) == 3)
    await supervisor.stop(grace_s=10)

    byes = [(line.text, service) for service, line in witness.lines if "bye" in line.text]
    assert [service for _, service in sorted(byes)] == ["gateway", "unet-0", "redis"]
    assert witness.deaths == []


async def test_a_service_that_will_not_stop_is_killed_after_its_grace_period(
    supervisor: Supervisor, witness: Witness
) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    await supervisor.start(script("stubborn", f"{stubborn}; {SLEEP}"))
    await wait_until(lambda: witness.lines)
    pid = supervisor.pids()["stubborn"]
    started_at = time.monotonic()
    await supervisor.stop(grace_s=0.3)
    assert 0.3 <= time.monotonic() - started_at < 5
    assert is_gone(pid)


async def test_a_second_wish_to_stop_kills_at_once(
    supervisor: Supervisor, witness: Witness
) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    await supervisor.start(script("stubborn", f"{stubborn}; {SLEEP}"))
    await wait_until(lambda: witness.lines)
    stopping = asyncio.create_task(supervisor.stop(grace_s=60))
    await asyncio.sleep(0.1)
    supervisor.kill()
    await asyncio.wait_for(stopping, 10)


async def test_a_service_can_be_stopped_while_it_waits_for_its_restart(
    tmp_path: Path, witness: Witness
) -> None:
    supervisor = Supervisor(
        log_folder=tmp_path,
        observer=witness,
        policy=RestartPolicy(first_delay_s=60, max_delay_s=60),
    )
    await supervisor.start(script("short", "pass"))
    await wait_until(lambda: witness.deaths)
    await asyncio.wait_for(supervisor.stop(grace_s=30), 5)


async def test_the_children_of_a_service_do_not_outlive_it(
    supervisor: Supervisor, witness: Witness
) -> None:
    source = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-S', '-c', {SLEEP!r}])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()"
    )
    await supervisor.start(script("parent", source))
    await wait_until(lambda: witness.lines)
    grandchild = int(witness.lines[0][1].text)
    os.kill(supervisor.pids()["parent"], signal.SIGKILL)
    await wait_until(lambda: witness.deaths)
    await wait_until(lambda: is_gone(grandchild))
    await supervisor.stop(grace_s=5)


SUPERVISOR_SCRIPT = """
import asyncio, os, signal, sys
from pathlib import Path
from cli.supervisor import Service, Supervisor

class Deaf:
    def on_log_line(self, service, line): pass
    def on_death(self, death): pass
    def on_end(self, pid): pass

async def main():
    supervisor = Supervisor(log_folder=Path(sys.argv[1]), observer=Deaf())
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    obey = "import time; time.sleep(60)"
    for name, death_signal, source in (
        ("service", signal.SIGKILL, ignore), ("redis", signal.SIGTERM, obey)
    ):
        await supervisor.start(Service(name=name, command=(sys.executable, "-S", "-c", source),
            environment=dict(os.environ), death_signal=death_signal))
    print(*supervisor.pids().values(), flush=True)
    await supervisor.wait_given_up()

asyncio.run(main())
"""


def test_no_service_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR_SCRIPT, tmp_path], stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout
        pids = [int(word) for word in supervisor.stdout.readline().split()]
        assert len(pids) == 2
        supervisor.kill()
        supervisor.wait()
        deadline = time.monotonic() + WAIT_S
        while not all(is_gone(pid) for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.02)
