"""What hangs is noticed, said, and ended; what is only slow goes on."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from shared.errors import EXIT_STUCK
from shared.watchdog import Patience, Watchdog

HANGS = """
import ctypes, threading, time
from shared.watchdog import Watchdog
watchdog = Watchdog()
def hang():
    with watchdog.watching("the 7th slot", 0.1):
        {sleep}(100)
threading.Thread(target=hang).start()
time.sleep(100)
"""

HANGS_WITH_THE_LOCK = """
import ctypes, threading, time
from shared.watchdog import watching_interpreter
def hang():
    ctypes.PyDLL(None).sleep(100)
with watching_interpreter(1.0) as renew:
    renew()
    threading.Thread(target=hang).start()
    time.sleep(100)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_process_ends_with_the_name_of_what_hangs() -> None:
    ended = run(HANGS.format(sleep="ctypes.CDLL(None).sleep"))
    assert ended.returncode == EXIT_STUCK
    assert "the 7th slot" in ended.stdout + ended.stderr
    assert "in hang" in ended.stderr  # where each thread is


def test_a_process_ends_whose_interpreter_is_stuck() -> None:
    ended = run(HANGS_WITH_THE_LOCK)
    assert ended.returncode != 0
    assert "in hang" in ended.stderr


def test_a_renewed_clock_ends_nothing() -> None:
    code = """
import time
from shared.watchdog import watching_interpreter
with watching_interpreter(1.0) as renew:
    for _ in range(20):
        renew()
        time.sleep(0.1)
time.sleep(2.0)
"""
    assert run(code).returncode == 0


def test_what_is_over_in_time_is_not_overdue() -> None:
    ended: list[str] = []
    watchdog = Watchdog(ended.append)
    for _ in range(3):
        with watchdog.watching("quick", 60.0):
            assert not watchdog.overdue
    watchdog.close()
    assert not ended


def test_one_of_several_calls_is_found() -> None:
    ended: list[str] = []
    said = threading.Event()

    def end(what: str) -> None:
        ended.append(what)
        said.set()

    watchdog = Watchdog(end)
    with watchdog.watching("quick", 60.0), watchdog.watching("stuck", 0.01):
        assert said.wait(30)
        assert watchdog.overdue == "stuck"
    assert ended == ["stuck"]
    assert not watchdog.overdue


def test_nothing_is_taken_for_stuck_before_the_floor() -> None:
    patience = Patience(60.0, 512 * 512)
    assert patience.within_s() == 60.0
    patience.learn(0.01)
    assert patience.within_s(rows=8) == 60.0


@pytest.mark.parametrize("rows", [1, 2, 48])
def test_more_rows_and_larger_pictures_may_take_longer(rows: int) -> None:
    patience = Patience(60.0, 512 * 512)
    patience.learn(20.0, rows=1)
    usual = patience.within_s(rows=rows)
    assert usual >= 10 * 20.0 * rows
    assert patience.within_s(rows=rows, pixels=1024 * 1024) >= 16 * usual


def test_patience_grows_with_what_was_seen() -> None:
    patience = Patience(60.0, 512 * 512)
    patience.learn(1.0)
    patience.learn(900.0, pixels=1024 * 1024)
    assert patience.within_s(pixels=1024 * 1024) >= 10 * 900.0
    patience.learn(0.5)
    assert patience.within_s(pixels=1024 * 1024) >= 10 * 900.0
