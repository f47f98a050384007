"""What both kinds of worker share: an inbox, an outbox, a heartbeat, and one compute thread.

Model calls run in the compute thread, so heartbeats and messages go on while a step runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from redis.asyncio import Redis

from shared import codec, keys
from shared.cuda_ipc import gpu_uuid
from shared.errors import ConfigurationError
from shared.host import device_identity, has_mps, host_identity
from shared.messages import (
    BeginEpoch,
    LeaveWhenDone,
    Message,
    RefuseWorker,
    WorkerDraining,
    WorkerInfo,
    WorkerLost,
    WorkerRegistered,
)
from shared.probe import READINESS
from shared.settings import WorkerSettings
from shared.streams import MAX_BLOCK_MS, Streams, script
from shared.tasks import TaskGroup
from shared.watchdog import Watchdog, watching_interpreter

T = TypeVar("T")

DELETE_EVERY_S = 1.0
"""Entries that were read lie in their streams for so long: deleting each at once is a command more
for every slot."""

LET_GO_TIMEOUT_S = 5.0
"""How long a draining worker without work waits for the scheduler's word; there may be none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a worker is, in the words of `WorkerInfo`."""

    host: str
    device: str
    device_group: str
    runs_side_by_side: bool


def find_place(device: torch.device, *, device_group: str = "", shares_host: bool = True) -> Place:
    """This process's place.

    device_group: a name given by the operator; empty means the physical device: this machine's CPU,
    or one GPU. shares_host: False keeps to the inline transport by sharing a host with nobody.
    """
    host = host_identity()
    uuid = gpu_uuid(device) if device.type == "cuda" else ""
    boot_id = host.partition(".")[0]
    return Place(
        host=host if shares_host else f"{host}-{socket.gethostname()}-{os.getpid()}",
        device=device_identity(uuid),
        device_group=device_group or f"{boot_id}/{uuid or 'cpu'}",
        runs_side_by_side=device.type != "cuda" or has_mps(os.environ),
    )


def sample_for(window_s: float, sample: Callable[[], T]) -> list[T]:
    """What `sample` returns, called again until the time is over; at least once.

    The first, which warms up, and the last, which outlasts the window, are left out where others
    are left.
    """
    ends_at = time.perf_counter() + window_s
    samples = [sample()]
    while time.perf_counter() < ends_at:
        samples.append(sample())
    return samples[1:-1] or samples[1:] or samples


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """A call's result, and how long it took."""

    result: T
    duration_s: float


class ComputeThread:
    """The one thread that calls the model.

    Args:
        default_threads: CPU threads of a call that asks for 0.
        watchdog: Watches over every call.
    """

    def __init__(self, default_threads: int, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._default_threads = default_threads
        self._threads = 0

    async def run(
        self, what: str, call: Callable[[], T], *, within_s: float, threads: int = 0
    ) -> T:
        """The call's result, as `run_timed`."""
        return (await self.run_timed(what, call, within_s=within_s, threads=threads)).result

    async def run_timed(
        self, what: str, call: Callable[[], T], *, within_s: float, threads: int = 0
    ) -> Timed[T]:
        """The call's result, computed with so many CPU threads (0: the default).

        what: in words. within_s: it is taken for stuck when it takes longer. The duration is the
        call's own, without the wait for the thread before it and for the event loop after it.
        """
        wanted = threads or self._default_threads

        def compute() -> Timed[T]:
            with self._watchdog.watching(what, within_s):
                if wanted != self._threads:
                    # A setting of the calling thread, so it has to happen here.
                    torch.set_num_threads(wanted)
                    self._threads = wanted
                started_at = time.perf_counter()
                result = call()
                return Timed(result, time.perf_counter() - started_at)

        return await asyncio.get_running_loop().run_in_executor(self._executor, compute)

    def close(self) -> None:
        """Let the current call end; wait for it."""
        self._executor.shutdown()


async def run_beside(watchdog: Watchdog, what: str, call: Callable[[], T], *, within_s: float) -> T:
    """The call's result, from a helper thread; as watched as what the compute thread runs."""

    def watched() -> T:
        with watchdog.watching(what, within_s):
            return call()

    return await asyncio.to_thread(watched)


def keep_helpers_serial() -> None:
    """Let `asyncio.to_thread` run tensor code on one core; call it in the event loop.

    Every thread that runs a parallel region has an OpenMP team of its own. As soon as a process's
    teams together have more threads than there are cores, libgomp puts the threads of all of them
    to sleep at every barrier instead of letting them wait a moment, the compute thread's, too: a
    decode of many small operations then takes twice as long.
    """
    executor = ThreadPoolExecutor(
        thread_name_prefix="helper", initializer=torch.set_num_threads, initargs=(1,)
    )
    asyncio.get_running_loop().set_default_executor(executor)


class WorkerLink:
    """A worker's side of the protocol.

    `work` and `control` fill by themselves once `run` runs; `post` keeps the order of what it is
    given and returns at once.

    A worker drains before it stops: `drain` asks the scheduler for nothing new, and once the worker
    holds nothing and `may_leave`, it calls `stop`.

    Args:
        redis: The connection; the caller owns it.
        incarnation: Whose streams to read.
        settings: After `heartbeat_ttl_ms` of silence a worker is lost; draining that takes longer
            than `drain_timeout_s` stops whatever is left.
        watchdog: While something is overdue, there are no heartbeats: work is what shows life.
    """

    def __init__(
        self, redis: Redis, incarnation: str, settings: WorkerSettings, watchdog: Watchdog
    ) -> None:
        self.incarnation = incarnation
        self.work: deque[Message] = deque()
        self.control: deque[Message] = deque()
        self._redis = redis
        self._streams = Streams(redis)
        self._heartbeat = script(redis, "heartbeat")
        self._heartbeat_ttl_ms = settings.heartbeat_ttl_ms
        self._max_call_s = settings.max_call_s
        self._watchdog = watchdog
        self._outbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self._drain_timeout_s = settings.drain_timeout_s
        self._has_news = asyncio.Event()
        self._is_draining = asyncio.Event()
        self._may_leave = False
        self._is_stopping = asyncio.Event()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._is_stopping.is_set()

    @property
    def is_draining(self) -> bool:
        """Whether `drain` was called."""
        return self._is_draining.is_set()

    @property
    def may_leave(self) -> bool:
        """Whether nothing new comes, by the scheduler's word or its silence, and all is taken."""
        return self._may_leave and not self.control and not self.work

    def drain(self) -> None:
        """Ask for nothing new; called again, stop at once."""
        if self.is_draining:
            self.stop()
            return
        self._is_draining.set()
        self.post(WorkerDraining(incarnation=self.incarnation))
        self._has_news.set()

    def stop(self) -> None:
        """End `run`, after what was posted is sent."""
        self._is_stopping.set()
        self._is_draining.set()
        self._has_news.set()

    def post(self, *messages: Message) -> None:
        """Send messages to the scheduler, in order, in the background."""
        for message in messages:
            self._outbox.put_nowait(message)

    def nudge(self) -> None:
        """Wake whoever waits for news."""
        self._has_news.set()

    async def news(self) -> None:
        """Wait until there is a message that has not been waited for, or the link stops."""
        await self._has_news.wait()
        self._has_news.clear()

    async def run(self, info: WorkerInfo) -> None:
        """Register, then read and send until stopped; says goodbye at the end.

        Raises:
            ConfigurationError: The scheduler has refused this worker.
        """
        await self._beat(info)
        async with TaskGroup() as group:
            group.create_task(self._beat_until_stopped(info))
            group.create_task(self._show_loop_alive())
            group.create_task(self._read_until_stopped())
            group.create_task(self._send_until_stopped())
            group.create_task(self._stop_drained_late())
        await self._redis.delete(keys.worker(self.incarnation))
        await self._streams.send(keys.SCHEDULER, WorkerLost(incarnation=self.incarnation))

    async def _beat(self, info: WorkerInfo) -> None:
        await self._heartbeat(
            keys=[
                keys.worker(self.incarnation),
                keys.WORKERS,
                keys.SCHEDULER,
                keys.work(self.incarnation),
                keys.control(self.incarnation),
            ],
            args=[
                codec.encode_value(info),
                self._heartbeat_ttl_ms,
                codec.encode(WorkerRegistered(worker=info)),
                self.incarnation,
            ],
        )
        READINESS.renew(self._heartbeat_ttl_ms / 1000)

    async def _beat_until_stopped(self, info: WorkerInfo) -> None:
        while not self.is_stopping:
            if self._watchdog.overdue:
                READINESS.renew(0)
            else:
                await self._beat(info)
            await self._pause(self._heartbeat_ttl_ms / 5_000)

    async def _show_loop_alive(self) -> None:
        """Apart from heartbeats, which wait where Redis is away."""
        with watching_interpreter(self._max_call_s) as renew:
            while not self.is_stopping:
                if not self._watchdog.overdue:
                    renew()
                await self._pause(min(1.0, self._max_call_s / 5))

    async def _stop_drained_late(self) -> None:
        """Bound the time that draining takes, with and without an answer."""
        await self._is_draining.wait()
        await self._pause(min(LET_GO_TIMEOUT_S, self._drain_timeout_s))
        self._may_leave = True
        self._has_news.set()
        await self._pause(self._drain_timeout_s - LET_GO_TIMEOUT_S)
        self.stop()

    async def _pause(self, seconds: float) -> None:
        """Wait for so long, or until stopped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_stopping.wait()

    async def _read_until_stopped(self) -> None:
        lanes = {
            keys.work(self.incarnation): self.work,
            keys.control(self.incarnation): self.control,
        }
        positions = dict.fromkeys(lanes, "0")
        taken: dict[str, list[str]] = {stream: [] for stream in lanes}
        next_deletion = time.monotonic() + DELETE_EVERY_S
        while not self.is_stopping:
            entries = await self._streams.read(positions, count=64, block_ms=MAX_BLOCK_MS)
            for entry in entries:
                lanes[entry.stream].append(entry.message)
                positions[entry.stream] = entry.entry_id
                taken[entry.stream].append(entry.entry_id)
                self._note(entry.message)
            if entries:
                self._has_news.set()
            if time.monotonic() >= next_deletion:
                # Nobody else reads these streams, so an entry has done its work once it is here.
                for stream, ids in taken.items():
                    await self._streams.delete(stream, ids)
                    ids.clear()
                next_deletion = time.monotonic() + DELETE_EVERY_S
        self._outbox.put_nowait(None)

    def _note(self, message: Message) -> None:
        """What concerns every worker's leaving."""
        match message:
            case LeaveWhenDone():
                self._may_leave = True
            case RefuseWorker(reason=reason):
                raise ConfigurationError(reason)
            case BeginEpoch() if self.is_draining:
                # This scheduler may not know yet.
                self._may_leave = False
                self.post(WorkerDraining(incarnation=self.incarnation))
            case _:
                pass

    async def _send_until_stopped(self) -> None:
        is_over = False
        while not is_over:
            batch = [await self._outbox.get()]
            while not self._outbox.empty():
                batch.append(self._outbox.get_nowait())
            is_over = None in batch
            await self._streams.send(keys.SCHEDULER, *(item for item in batch if item is not None))
