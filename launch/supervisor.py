"""Keeps services running as child processes: starts, restarts, follows their logs, stops in order.

No service outlives the supervisor, and none of its own children outlives a service: each runs in
a process group of its own (so that Ctrl-C reaches the supervisor alone), the rest of the group is
killed when the service is gone, and `launch/child.py` ties each service to the supervisor's life.
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

from launch import child
from launch.restarts import DeathCount, RestartPolicy
from launch.service_log import LogLine, ServiceLog
from shared.errors import EXIT_CONFIGURATION

_FOLLOW_EVERY_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What to run."""

    name: str
    """Unique; also the log's."""
    command: tuple[str, ...]
    environment: Mapping[str, str]
    """All of it: nothing is inherited."""
    stop_rank: int = 0
    """Lower ones are stopped first, equal ones together."""
    death_signal: signal.Signals = signal.SIGKILL
    """What the kernel sends the service should the supervisor die."""
    inherited_fds: tuple[int, ...] = ()
    """Descriptors of the supervisor that it holds open as long as it lives."""
    niceness: int = 0
    """By how much it gives way to other processes, 0 to 19."""
    final_exit_codes: frozenset[int] = frozenset({EXIT_CONFIGURATION})
    """With which it says that another start would end alike."""

    @property
    def child_command(self) -> tuple[str, ...]:
        """Return the command line, tied to this process's life."""
        return (
            *(sys.executable, "-I", "-S", child.__file__),
            *(str(os.getpid()), str(int(self.death_signal)), str(self.niceness)),
            *self.command,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A service ended unasked."""

    service: str
    pid: int
    exit_code: int
    """As `subprocess` has it, negative for a signal."""
    lived_s: float
    restart_in_s: float | None
    """None if the service is given up."""
    is_final: bool
    """Whether its exit code says that another start would end alike."""
    hardship: str
    """What outside of the service may have ended it, in words; empty for nothing."""
    last_lines: tuple[str, ...]
    """Of its log."""

    @property
    def cause(self) -> str:
        """Return what ended it, in words."""
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-self.exit_code).name}"
        return f"killed by signal {-self.exit_code}"


class Observer(Protocol):
    """Who is told what happens; called on the event loop, must not block."""

    def on_log_line(self, service: str, line: LogLine) -> None:
        """Take a line that a service has written."""

    def on_death(self, death: Death) -> None:
        """Take the news that a service has ended unasked; it is restarted, or given up."""

    def on_end(self, pid: int) -> None:
        """Clear what a process left behind, which is gone, asked or unasked."""


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
        """Return the process id of each service that runs."""
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
        """Give up when a keeper has failed, which would be a bug and must not go unnoticed."""
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
        """Start it after the delay, however often that takes; return None if it is to stop."""
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
        """Hand on the service's log until it ends, and return its exit code.

        The system does not tell of a process's end while a tracer holds one of its threads. Such a
        process is over when it was seen to have exited twice; it is reaped once the tracer lets go.
        """
        waiter = asyncio.ensure_future(process.wait())
        had_exited = False
        exit_code: int | None = None
        while exit_code is None:
            await asyncio.wait({waiter}, timeout=_FOLLOW_EVERY_S)
            unreaped = None if waiter.done() else _unreaped_exit_code(process.pid)
            if waiter.done():
                exit_code = waiter.result()
            elif had_exited:
                exit_code = unreaped
            had_exited = unreaped is not None
            for line in kept.log.read_new_lines(is_final=exit_code is not None):
                self._observer.on_log_line(kept.service.name, line)
        waiter.cancel()
        return exit_code

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


def _unreaped_exit_code(pid: int) -> int | None:
    """Return the exit code of a child that has exited and was not reaped yet, None for others."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(fields[-1])) if fields[0] == "Z" else None
