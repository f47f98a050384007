from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli.service_log import ServiceLog, explanation, level_of
from cli.supervisor import DeathCount, RestartPolicy


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("2026-11-23T10:00:00Z [warning  ] pool is full", "warning"),
        ("2026-11-23T10:00:00Z [info     ] epoch begun", "info"),
        ('{"event": "x", "level": "error"}', "error"),
        ("Traceback (most recent call last):", ""),
    ],
)
def test_a_line_may_name_its_level(line: str, level: str) -> None:
    assert level_of(line) == level


def write(log: ServiceLog, content: bytes) -> None:
    descriptor = log.open_for_service()
    os.write(descriptor, content)
    os.close(descriptor)


def test_a_log_hands_out_whole_lines_once(tmp_path: Path) -> None:
    log = ServiceLog(tmp_path / "x.log")
    write(log, b"[error] one\ntw")
    assert [line.text for line in log.read_new_lines()] == ["[error] one"]
    write(log, b"o\nrest")
    assert [line.text for line in log.read_new_lines()] == ["two"]
    assert [line.text for line in log.read_new_lines(is_final=True)] == ["rest"]
    assert log.tail == ("[error] one", "two", "rest")


def test_the_log_of_the_run_before_is_kept(tmp_path: Path) -> None:
    write(ServiceLog(tmp_path / "x.log"), b"old\n")
    log = ServiceLog(tmp_path / "x.log")
    assert log.path.read_text() == ""
    assert (tmp_path / "x.log.1").read_text() == "old\n"


def test_a_log_that_grows_too_large_begins_again_under_the_same_descriptor(tmp_path: Path) -> None:
    log = ServiceLog(tmp_path / "x.log", max_bytes=10)
    descriptor = log.open_for_service()
    os.write(descriptor, b"0123456789abc\n")
    assert len(log.read_new_lines()) == 1
    os.write(descriptor, b"more\n")
    os.close(descriptor)
    assert [line.text for line in log.read_new_lines()] == ["more"]
    assert log.path.read_bytes() == b"more\n"
    assert (tmp_path / "x.log.1").read_bytes() == b"0123456789abc\n"


def test_delays_double_up_to_their_maximum() -> None:
    deaths = DeathCount(policy=RestartPolicy(first_delay_s=1, max_delay_s=5, max_quick_deaths=9))
    delays = [deaths.delay_after(exit_code=1, lived_s=0) for _ in range(5)]
    assert delays == [1, 2, 4, 5, 5]


def test_a_long_life_forgives_the_deaths_before_it() -> None:
    deaths = DeathCount(policy=RestartPolicy(max_quick_deaths=2, quick_death_s=10))
    assert deaths.delay_after(exit_code=1, lived_s=1) is not None
    assert deaths.delay_after(exit_code=1, lived_s=11) is not None
    assert deaths.delay_after(exit_code=1, lived_s=1) is None


def test_a_kill_from_outside_never_makes_the_supervisor_give_up() -> None:
    deaths = DeathCount(policy=RestartPolicy(max_quick_deaths=2))
    assert all(deaths.delay_after(exit_code=-9, lived_s=0) is not None for _ in range(50))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ("Z [error    ] stopped   code=x error='there\\'s no \"x\"' service=unet",),
            'there\'s no "x"',
        ),
        (("Z [error    ] stopped   code=x error=short service=unet",), "short"),
        (('{"event": "stopped", "error": "no \\"x\\"", "level": "error"}', ""), 'no "x"'),
        (
            ("1:M 28 Nov 2026 14:23:58.867 # Bad file format", "1:M 28 Nov 2026 * bye"),
            "Bad file format",
        ),
        (("unet: SYNERDIFF_X=1: too small",), "unet: SYNERDIFF_X=1: too small"),
        ((), ""),
    ],
)
def test_what_ended_a_service_is_told_in_its_own_words(lines: tuple[str, ...], words: str) -> None:
    assert explanation(lines) == words


def test_a_log_that_finds_no_room_for_a_copy_is_emptied_all_the_same(tmp_path: Path) -> None:
    log = ServiceLog(tmp_path / "x.log", max_bytes=10)
    (tmp_path / "x.log.1").mkdir()  # no copy can be made
    write(log, b"0123456789abc\n")
    assert len(log.read_new_lines()) == 1
    assert log.path.read_bytes() == b""


def test_a_final_end_is_final_from_the_first_and_excused_by_a_hardship() -> None:
    deaths = DeathCount(policy=RestartPolicy())
    excused = {"exit_code": 78, "lived_s": 1.0, "is_final": True, "is_excused": True}
    assert all(deaths.delay_after(**excused) is not None for _ in range(50))  # type: ignore[arg-type]
    assert deaths.delay_after(exit_code=78, lived_s=100, is_final=True) is None
