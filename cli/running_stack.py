"""Runs a prepared stack from its first process to its last trace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from redis import RedisError
from redis.asyncio import Redis
from rich.console import Console

from cli.data_folder import DataFolder, default_data_folder
from cli.disk import full_disk
from cli.embedded_redis import (
    choose_socket,
    find_redis_binary,
    socket_url,
    wait_for_redis,
    without_password,
)
from cli.machine import memory_bytes
from cli.narrator import Narrator
from cli.readiness import StartWatch
from cli.redis_data import read_snapshot_format
from cli.service_log import LogLine, explanation
from cli.stack import (
    GRACE_S,
    Stack,
    StackOptions,
    limit_image_budget,
    prepare_stack,
    redis_service,
)
from cli.supervisor import Death, Service, Supervisor
from shared.errors import ConfigurationError
from shared.host import SHM_DIRECTORY
from shared.metrics_files import clear_after
from shared.pool_file import sweep
from shared.tasks import end_tasks

REDIS_LOAD_TIMEOUT_S: Final = 300.0
EMBEDDED_REDIS_TIMEOUT_S: Final = 10.0
EXTERNAL_REDIS_TIMEOUT_S: Final = 3.0
_LOOK_AT_DISK_EVERY_S: Final = 1.0
_CLIENT_TIMEOUT_S: Final = 5.0


def run_stack(
    options: StackOptions, *, data_dir: Path | None, redis_url: str | None, verbose: bool
) -> int:
    """Run a stack until it is told to stop; the exit code: 0, or 1 if a service was given up.

    Raises:
        ConfigurationError: It can't run as it was asked to; nothing has been started then, or
            everything is stopped again.
    """
    folder = DataFolder(path=(data_dir or default_data_folder()).absolute())
    narrator = Narrator(Console(), is_verbose=verbose)
    redis_url = redis_url or os.environ.get("SYNERDIFF_REDIS_URL")
    if not redis_url:
        limit_image_budget(memory_bytes())
    stack = prepare_stack(options)
    with folder.locked(f"process {os.getpid()} ({stack.url})") as lock_descriptor:
        folder.create()
        sweep()
        redis: Service | None = None
        socket_path: Path | None = None
        if redis_url:
            redis_detail = f"{without_password(redis_url)}, running already"
        else:
            binary = find_redis_binary(data=read_snapshot_format(folder.redis))
            socket_path = choose_socket(folder.path, Path(tempfile.gettempdir()))
            redis = redis_service(
                binary,
                folder=folder,
                socket_path=socket_path,
                memory_bytes=memory_bytes(),
                lock_descriptor=lock_descriptor,
            )
            redis_url = socket_url(socket_path)
            redis_detail = f"{binary}, data in {folder.path}"
        running = RunningStack(
            stack=stack,
            folder=folder,
            narrator=narrator,
            redis_url=redis_url,
            redis=redis,
            redis_detail=redis_detail,
        )
        try:
            return asyncio.run(running.run())
        except RedisError as error:
            raise ConfigurationError(f"Redis failed during the start: {error}") from error
        finally:
            if socket_path:
                socket_path.unlink(missing_ok=True)
            sweep()


@dataclass(slots=True)
class RunningStack:
    """One run of a stack; observes its own supervisor.

    redis: the embedded server, None if `redis_url` names somebody else's. redis_detail: what to
    say of it.
    """

    stack: Stack
    folder: DataFolder
    narrator: Narrator
    redis_url: str
    redis: Service | None
    redis_detail: str
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _final: Death | None = None
    _disk_problem: str = ""

    def on_log_line(self, service: str, line: LogLine) -> None:
        """Pass it on, unless it is a service's word on the others' leaving."""
        if not self._stopping.is_set():
            self.narrator.log_line(service, line)

    def on_death(self, death: Death) -> None:
        """Pass it on; keep what ends the stack."""
        self.narrator.death(death, self.folder.logs)
        if death.is_final and death.restart_in_s is None:
            self._final = death

    def on_end(self, pid: int) -> None:
        """Clear what the process left: gauges of its own, and its tensor pool if it had one."""
        clear_after(pid, self.folder.metrics)
        sweep()

    def find_hardship(self) -> str:
        """What ends services through no fault of theirs, in words."""
        return self._disk_problem or full_disk([self.folder.path, SHM_DIRECTORY])

    async def run(self) -> int:
        """Start everything, wait, stop everything; the exit code.

        Raises:
            ConfigurationError: A service says that it can't run as it was asked to.
        """
        supervisor = Supervisor(
            log_folder=self.folder.logs, observer=self, find_hardship=self.find_hardship
        )
        loop = asyncio.get_running_loop()
        for number in stop_signals():
            loop.add_signal_handler(number, self._on_signal, supervisor)
        end = asyncio.create_task(self._wait_for_end(supervisor))
        start = asyncio.create_task(self._start(supervisor))
        disk = asyncio.create_task(self._watch_disk())
        try:
            await asyncio.wait({start, end}, return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                start.result()
            exit_code = await end
        finally:
            await end_tasks([start, end, disk])
            with self.narrator.waiting("Stopping"):
                await supervisor.stop(grace_s=GRACE_S)
            self.narrator.say("SynerDiff has stopped")
        if self._final:
            raise ConfigurationError(
                f"{self._final.service} can't run: {explanation(self._final.last_lines)}"
            )
        return exit_code

    def _on_signal(self, supervisor: Supervisor) -> None:
        """The first one asks, the second one insists."""
        if self._stopping.is_set():
            supervisor.kill()
        self._stopping.set()

    async def _wait_for_end(self, supervisor: Supervisor) -> int:
        stopped = asyncio.create_task(self._stopping.wait())
        given_up = asyncio.create_task(supervisor.wait_given_up())
        try:
            await asyncio.wait({stopped, given_up}, return_when=asyncio.FIRST_COMPLETED)
            return 0 if stopped.done() else 1
        finally:
            await end_tasks([stopped, given_up])

    async def _start(self, supervisor: Supervisor) -> None:
        with self.narrator.waiting("Starting"):
            await self._start_redis(supervisor)
            redis = Redis.from_url(self.redis_url, protocol=2, socket_timeout=_CLIENT_TIMEOUT_S)
            async with redis:
                watch = await StartWatch.begin(redis, self.stack)
                for service in self.stack.services(self.redis_url, self.folder.metrics):
                    await supervisor.start(service)
                async with contextlib.aclosing(watch.announcements()) as announcements:
                    async for announcement in announcements:
                        self.narrator.service_up(announcement.service, announcement.detail)
        self.narrator.say(f"SynerDiff is ready: {self.stack.url}", style="bold green")

    async def _start_redis(self, supervisor: Supervisor) -> None:
        if not self.redis:
            await wait_for_redis(
                self.redis_url,
                timeout_s=EXTERNAL_REDIS_TIMEOUT_S,
                loading_timeout_s=REDIS_LOAD_TIMEOUT_S,
            )
            self.narrator.service_up("redis", self.redis_detail)
            return
        await supervisor.start(self.redis)
        try:
            await wait_for_redis(
                self.redis_url,
                timeout_s=EMBEDDED_REDIS_TIMEOUT_S,
                loading_timeout_s=REDIS_LOAD_TIMEOUT_S,
            )
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}; see {self.folder.logs / 'redis.log'}") from error
        self.narrator.service_up("redis", self.redis_detail)

    async def _watch_disk(self) -> None:
        """Say when the disk is full, and when there is room again."""
        client = Redis.from_url(self.redis_url, protocol=2, socket_timeout=_CLIENT_TIMEOUT_S)
        async with client:
            while True:
                await asyncio.sleep(_LOOK_AT_DISK_EVERY_S)
                problem = full_disk([self.folder.path])
                if not problem and self.redis and not await _can_write(client):
                    problem = "Redis can't write to its disk"
                if bool(problem) != bool(self._disk_problem):
                    self._say_of_disk(problem)
                self._disk_problem = problem

    def _say_of_disk(self, problem: str) -> None:
        if problem:
            self.narrator.say(f"{problem}; no new pictures until there is room", style="red")
        else:
            self.narrator.say("The disk has room again", style="green")


def stop_signals() -> list[signal.Signals]:
    """What asks a stack to stop. Whoever runs it under nohup has SIGHUP ignored, and means it."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


async def _can_write(client: Redis) -> bool:
    """Whether the server's last write to its files went well; while it does not answer, it did."""
    with contextlib.suppress(RedisError, OSError):
        facts = await client.info("persistence")
        return bool(facts.get("aof_last_write_status", "ok") == "ok")
    return True
