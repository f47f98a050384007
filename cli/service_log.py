"""A service's log file: the service writes it, the supervisor follows it and keeps it small.

A disk that is full costs lines, never the service or its supervisor.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ALARMING_LEVELS: Final = frozenset({"warning", "error", "critical"})
MAX_LOG_BYTES: Final = 32 << 20
_MAX_READ_BYTES: Final = 1 << 20
_LEVEL_MARK: Final = re.compile(
    r"""\[(?P<text>debug|info|warning|error|critical)\s*\]"""
    r"""|"level":\s*"(?P<json>debug|info|warning|error|critical)\""""
)
_ERROR_AS_TEXT: Final = re.compile(
    r"""\berror=(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|\berror=(?P<word>\S+)"""
)
_REDIS_WARNING: Final = re.compile(r"^\d+:\w .* # (?P<text>.*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of a service's output. level: empty if it names none, as a traceback's lines."""

    text: str
    level: str

    @property
    def is_alarming(self) -> bool:
        """Whether a person at the terminal should see it unasked."""
        return self.level in ALARMING_LEVELS


def level_of(line: str) -> str:
    """The level that a line names, as `shared.logs` writes it, as text or JSON; or empty."""
    match = _LEVEL_MARK.search(line)
    return (match["text"] or match["json"]) if match else ""


def explanation(lines: Sequence[str]) -> str:
    """Why a service ended, in its own words without what stands around them; empty if it said none.

    lines: its last. They are read as `shared.logs` writes the error that ends a service, as text or
    JSON, as Redis writes a warning, and otherwise as they are.
    """
    for line in reversed(lines):
        if match := _ERROR_AS_TEXT.search(line):
            return str(ast.literal_eval(match["quoted"])) if match["quoted"] else match["word"]
        with contextlib.suppress(ValueError):
            facts = json.loads(line)
            if isinstance(facts, dict) and "error" in facts:
                return str(facts["error"])
        if match := _REDIS_WARNING.match(line):
            return match["text"]
    return lines[-1] if lines else ""


class ServiceLog:
    """One log file, begun anew; what was there before is kept beside it as `NAME.log.1`.

    Args:
        path: The file. Its folder exists.
        max_bytes: Beyond this the file moves to `.1` and goes on empty.
        tail_lines: Last lines to remember.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_LOG_BYTES, tail_lines: int = 15) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._tail: deque[str] = deque(maxlen=tail_lines)
        self._position = 0
        self._rest = b""
        with contextlib.suppress(OSError):
            path.replace(self._previous_path)
        with contextlib.suppress(OSError):
            path.touch()

    @property
    def _previous_path(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines read."""
        return tuple(self._tail)

    def open_for_service(self) -> int:
        """A descriptor to give to the service as its output; the caller closes it.

        It appends, so that the file can be emptied while the service writes. Where there is no room
        for the file, what the service says is lost.
        """
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            return os.open(self.path, flags, 0o600)
        except OSError:
            return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

    def read_new_lines(self, *, is_final: bool = False) -> list[LogLine]:
        """Whole lines written since the last call; with `is_final` an unfinished one, too."""
        content = b""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self._position)
            content = file.read(_MAX_READ_BYTES)
        self._position += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        if is_final and self._rest:
            lines.append(self._rest)
            self._rest = b""
        if self._position > self._max_bytes:
            self._start_over()
        return [self._line(line.decode(errors="replace").rstrip()) for line in lines]

    def _line(self, text: str) -> LogLine:
        if text:
            self._tail.append(text)
        return LogLine(text=text, level=level_of(text))

    def _start_over(self) -> None:
        """Copy, then empty: the service's descriptor stays good; a line in between may be lost.

        Without room for the copy the file is emptied all the same, which makes room.
        """
        try:
            shutil.copyfile(self.path, self._previous_path)
        except OSError:
            with contextlib.suppress(OSError):
                self._previous_path.unlink()
        with contextlib.suppress(OSError):
            os.truncate(self.path, 0)
            self._position = 0
