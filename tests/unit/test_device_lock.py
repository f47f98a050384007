"""Workers of a device start one after another, but none waits for ever."""

from __future__ import annotations

import threading
from pathlib import Path

from shared.device_lock import alone_on


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []
    is_in = threading.Event()

    def second() -> None:
        is_in.wait()
        with alone_on("cpu", directory=tmp_path) as is_alone:
            assert is_alone
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with alone_on("cpu", directory=tmp_path) as is_alone:
        assert is_alone
        is_in.set()
        thread.join(0.3)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_the_wait_is_bounded_and_devices_are_apart(tmp_path: Path) -> None:
    with alone_on("cpu", directory=tmp_path):
        with alone_on("cpu", directory=tmp_path, max_wait_s=0.1) as is_alone:
            assert not is_alone
        with alone_on("cuda:0", directory=tmp_path) as is_alone:
            assert is_alone


def test_without_a_place_for_a_lock_it_goes_on(tmp_path: Path) -> None:
    with alone_on("cpu", directory=tmp_path / "nowhere") as is_alone:
        assert not is_alone
