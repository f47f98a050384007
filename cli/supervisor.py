"""Keeps services running as child processes: starts, restarts, follows their logs, stops in order.

No service outlives the supervisor, and none of its own children outlives a service: each runs in
a process group of its own (so that Ctrl-C reaches the supervisor alone), the rest of the group is
killed when the service is gone, and `cli/child.py` ties each service to the supervisor's life.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from cli import child
from cli.service_log import LogLine, ServiceLog
from shared.errors import EXIT_CONFIGURATION

_FOLLOW_EVERY_S: Final = 0.2
_OUTSIDE_SIGNALS: Final = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What to run.

    name: unique; also the log's. environment: all of it. stop_rank: lower ones are stopped first,
    equal ones together. death_signal: what the kernel sends it should the supervisor die.
    inherited_fds: descriptors of the supervisor that it holds open as long as it lives.
    niceness: by how much it gives way to other processes, 0 to 19. final_exit_codes: with which it
    says that another start would end alike.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    stop_rank: int = 0
    death_signal: signal.Signals = signal.SIGKILL
    inherited_fds: tuple[int, ...] = ()
    niceness: int = 0
    final_exit_codes: frozenset[int] = frozenset({EXIT_CONFIGURATION})

    @property
    def child_command(self) -> tuple[str, ...]:
        """Its command line, tied to this process's life."""
        return (
            *(sys.executable, "-I", "-S", child.__file__),
            *(str(os.getpid()), str(int(self.death_signal)), str(self.niceness)),
            *self.command,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A service ended unasked.

    exit_code: as `subprocess` has it, negative for a signal. restart_in_s: None if it is given up.
    is_final: whether its exit code says that another start would end alike. hardship: what outside
    of it may have ended it, in words; empty for nothing. last_lines: of its log.
    """

    service: str
    pid: int
    exit_code: int
    lived_s: float
    restart_in_s: float | None
    is_final: bool
    hardship: str
    last_lines: tuple[str, ...]

    @property
    def cause(self) -> str:
        """What ended it, in words."""
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-self.exit_code).name}"
        return f"killed by signal {-self.exit_code}"


class Observer(Protocol):
    """Who is told what happens; called on the event loop, must not block."""

    def on_log_line(self, service: str, line: LogLine) -> None:
        """A service has written a line."""

    def on_death(self, death: Death) -> None:
        """A service has ended unasked; it will be restarted, or is given up."""

    def on_end(self, pid: int) -> None:
        """A service's process is gone, asked or unasked; what it left behind may be cleared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When to restart. The delay doubles with every quick death in a row, up to its maximum.

    quick_death_s: a life shorter than this ends in a quick death. max_quick_deaths: so many in a
    row of the service's own making, and it is given up. What counts is the cause: a kill from
    outside never does, nor a death under a hardship such as a full disk, which is waited out.
    """

    first_delay_s: float = 0.1
    max_delay_s: float = 5.0
    quick_death_s: float = 20.0
    max_quick_deaths: int = 6


@dataclass(slots=True)
class DeathCount:
    """The quick deaths in a row of one service, and what follows from the next one."""

    policy: RestartPolicy
    num_quick: int = 0
    num_own: int = 0

    def delay_after(
        self, *, exit_code: int, lived_s: float, is_final: bool = False, is_excused: bool = False
    ) -> float | None:
        """Seconds until the restart, None to give up."""
        if lived_s >= self.policy.quick_death_s:
            self.num_quick = self.num_own = 0
        self.num_quick += 1
        if not is_excused and exit_code not in _OUTSIDE_SIGNALS:
            self.num_own += 1
            if is_final or self.num_own >= self.policy.max_quick_deaths:
                return None
        return min(
            self.policy.first_delay_s * 2.0 ** min(self.num_quick - 1, 16), self.policy.max_delay_s
        )


@dataclass(slots=True)
class _Kept:
    """One service and its current process."""

    service: Service
    log: ServiceLog
    deaths: DeathCount
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    process: Process | None = None
    keeper: asyncio.Task[None] | None = None

    def signal_group(self, number: signal.Signals) -> None:
        """Signal the service's whole process group, if any of it is left."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


class Supervisor:
    """Runs services until `stop`.

    Args:
        log_folder: Where `NAME.log` goes; exists.
        observer: Is told what happens.
        policy: When to restart.
        find_hardship: What outside of the services ends them at present, in words; or empty.
    """

    def __init__(
        self,
        *,
        log_folder: Path,
        observer: Observer,
        policy: RestartPolicy | None = None,
        find_hardship: Callable[[], str] = str,
    ) -> None:
        self._log_folder = log_folder
        self._observer = observer
        self._policy = policy or RestartPolicy()
        self._find_hardship = find_hardship
        self._kept: dict[str, _Kept] = {}
        self._given_up = asyncio.Event()

    async def start(self, service: Service) -> None:
        """Start a service and keep it running from now on; returns once its process is there."""
        assert service.name not in self._kept
        kept = _Kept(
            service=service,
            log=ServiceLog(self._log_folder / f"{service.name}.log"),
            deaths=DeathCount(policy=self._policy),
        )
        self._kept[service.name] = kept
        kept.process = await self._spawn(kept)
        kept.keeper = asyncio.create_task(self._keep(kept), name=f"keep {service.name}")
        kept.keeper.add_done_callback(self._on_keeper_done)

    def pids(self) -> dict[str, int]:
        """The process id of each service that runs."""
        return {
            name: kept.process.pid
            for name, kept in self._kept.items()
            if kept.process and kept.process.returncode is None
        }

    async def wait_given_up(self) -> None:
        """Return when some service has been given up; the observer knows which and why."""
        await self._given_up.wait()

    async def stop(self, *, grace_s: float) -> None:
        """Stop every service, rank by rank; each rank is killed after its grace period."""
        ranks = sorted({kept.service.stop_rank for kept in self._kept.values()})
        for rank in ranks:
            members = [kept for kept in self._kept.values() if kept.service.stop_rank == rank]
            await asyncio.gather(*(self._stop(kept, grace_s) for kept in members))

    def kill(self) -> None:
        """Kill every service now; a `stop` under way then ends at once."""
        for kept in self._kept.values():
            kept.stopping.set()
            kept.signal_group(signal.SIGKILL)

    def _on_keeper_done(self, keeper: asyncio.Task[None]) -> None:
        """A keeper that fails, which would be a bug, must not go unnoticed."""
        if not keeper.cancelled() and keeper.exception():
            self._given_up.set()

    async def _keep(self, kept: _Kept) -> None:
        while True:
            process = kept.process
            assert process is not None
            started_at = time.monotonic()
            exit_code = await self._follow(kept, process)
            kept.signal_group(signal.SIGKILL)
            self._observer.on_end(process.pid)
            if kept.stopping.is_set():
                return
            lived_s = time.monotonic() - started_at
            is_final = exit_code in kept.service.final_exit_codes
            hardship = self._find_hardship()
            delay_s = kept.deaths.delay_after(
                exit_code=exit_code,
                lived_s=lived_s,
                is_final=is_final,
                is_excused=bool(hardship),
            )
            self._observer.on_death(
                Death(
                    service=kept.service.name,
                    pid=process.pid,
                    exit_code=exit_code,
                    lived_s=lived_s,
                    restart_in_s=delay_s,
                    is_final=is_final,
                    hardship=hardship,
                    last_lines=kept.log.tail,
                )
            )
            if delay_s is None:
                self._given_up.set()
                return
            process = await self._spawn_again(kept, delay_s)
            if process is None:
                return
            kept.process = process
            if kept.stopping.is_set():
                kept.signal_group(signal.SIGTERM)

    async def _spawn_again(self, kept: _Kept, delay_s: float) -> Process | None:
        """Start it after the delay, as often as that takes; None if it is to stop meanwhile."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(kept.stopping.wait(), delay_s)
            if kept.stopping.is_set():
                return None
            try:
                return await self._spawn(kept)
            except OSError:  # no process or no memory is to be had at the moment
                delay_s = self._policy.max_delay_s

    async def _follow(self, kept: _Kept, process: Process) -> int:
        """Hand on the service's log until it ends; its exit code."""
        waiter = asyncio.ensure_future(process.wait())
        is_over = False
        while not is_over:
            is_over = bool((await asyncio.wait({waiter}, timeout=_FOLLOW_EVERY_S))[0])
            for line in kept.log.read_new_lines(is_final=is_over):
                self._observer.on_log_line(kept.service.name, line)
        return waiter.result()

    async def _spawn(self, kept: _Kept) -> Process:
        """Start the service's process; in the main thread, whose end is the supervisor's."""
        service = kept.service
        output = kept.log.open_for_service()
        try:
            return await asyncio.create_subprocess_exec(
                *service.child_command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(service.environment),
                pass_fds=service.inherited_fds,
                start_new_session=True,
            )
        finally:
            os.close(output)

    async def _stop(self, kept: _Kept, grace_s: float) -> None:
        kept.stopping.set()
        if kept.keeper is None or kept.process is None:
            return
        if kept.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                kept.process.terminate()
        done, _ = await asyncio.wait({kept.keeper}, timeout=grace_s)
        if not done:
            kept.signal_group(signal.SIGKILL)
        await kept.keeper
