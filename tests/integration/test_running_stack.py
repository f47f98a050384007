"""The life of a stack around its services."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cli.data_folder import DataFolder
from cli.disk import full_disk
from cli.narrator import Narrator
from cli.running_stack import RunningStack
from cli.stack import Stack
from cli.supervisor import Supervisor

WAIT_S = 30.0


class DeafStack(RunningStack):
    """Its start loses the first cancellations, as the Redis client may on Python 3.11."""

    async def _start(self, supervisor: Supervisor) -> None:
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
        await asyncio.sleep(3600)


async def test_a_stack_ends_though_its_start_loses_a_cancellation(
    tmp_path: Path, own_signals: None
) -> None:
    folder = DataFolder(path=tmp_path)
    stack = Stack(
        host="127.0.0.1",
        port=1,
        model=tmp_path,
        policy="",
        unet_workers=(),
        vae_workers=(),
        environment={},
    )
    running = DeafStack(
        stack=stack,
        folder=folder,
        narrator=Narrator(Console(quiet=True), is_verbose=False),
        redis_url="unix:///nowhere",
        redis=None,
        redis_detail="",
    )
    asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running.run(), WAIT_S) == 0


@pytest.fixture
def own_signals() -> object:
    """Signals as they were, whatever a stack installs."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("handler", "is_ignored"), [("SIG_IGN", True), ("SIG_DFL", False)])
def test_who_ignores_the_end_of_the_terminal_goes_on_ignoring_it(
    handler: str, is_ignored: bool
) -> None:
    source = (
        f"import os, signal; signal.signal(signal.SIGHUP, signal.{handler});"
        "os.execv(sys.executable, [sys.executable, '-c',"
        "'from cli.running_stack import stop_signals; print(*stop_signals())'])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; {source}"], capture_output=True, text=True, check=True
    )
    assert (str(int(signal.SIGHUP)) in answer.stdout.split()) != is_ignored


def test_a_terminal_that_is_gone_costs_what_is_said_and_nothing_else() -> None:
    with open("/dev/full", "w", buffering=1) as full:  # noqa: PTH123 - a device
        narrator = Narrator(Console(file=full), is_verbose=True)
        narrator.say("nobody reads this")
        narrator.service_up("gateway", "nor this")
        with contextlib.suppress(OSError):
            full.close()


def test_a_disk_with_room_is_not_full(tmp_path: Path) -> None:
    assert full_disk([tmp_path, tmp_path / "missing"]) == ""
