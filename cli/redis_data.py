"""What an embedded server's data is written in, and which servers read it.

Servers are told to write their append-only files as plain commands, which any other one reads.
What an earlier version of this project wrote begins with a snapshot, whose format has a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HEADER: Final = re.compile(rb"(REDIS|VALKEY)(\d+)")
_HEADER_BYTES: Final = 16
_BASE_FILE: Final = re.compile(r"^file (\S+) seq \d+ type b", re.MULTILINE)
_REDIS_FORMATS: Final = (((7, 4), 12), ((7, 2), 11), ((7, 0), 10))
"""Since which version of Redis it reads which format, newest first. Later versions than these have
kept reading what is older, and may know formats that are not known here."""
_LAST_COMMON_FORMAT: Final = 11
"""Valkey and Redis went apart after it."""
_NEW_VALKEY: Final = (9, 0)
"""Since then Valkey's formats have a name and numbers of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFormat:
    """The format of a snapshot. number: Redis' or Valkey's own, as the header has it."""

    is_valkey: bool
    number: int

    def __str__(self) -> str:
        return f"{'Valkey' if self.is_valkey else 'Redis'} snapshot format {self.number}"

    def is_read_by(self, *, is_valkey: bool, version: tuple[int, ...]) -> bool:
        """Whether a server of that kind and version reads it."""
        if self.is_valkey:
            return is_valkey and version >= _NEW_VALKEY
        if is_valkey:
            return self.number <= _LAST_COMMON_FORMAT
        newest_version, newest_format = _REDIS_FORMATS[0]
        if version[:2] > newest_version and self.number > newest_format:
            return True  # it may; it will say so otherwise
        return any(
            version[:2] >= since and self.number <= number for since, number in _REDIS_FORMATS
        )


def read_snapshot_format(folder: Path) -> SnapshotFormat | None:
    """The format of the snapshot that a server's data begins with; None if it has none.

    folder: the server's; may be empty or missing.
    """
    files = folder / "appendonlydir"
    try:
        manifest = (files / "appendonly.aof.manifest").read_text(errors="replace")
        base = _BASE_FILE.search(manifest)
        if not base:
            return None
        with (files / Path(base[1]).name).open("rb") as file:
            header = _HEADER.match(file.read(_HEADER_BYTES)[:9])
    except OSError:
        return None  # there is none, or it can't be read: the server has the words for that
    return (
        SnapshotFormat(is_valkey=header[1] == b"VALKEY", number=int(header[2])) if header else None
    )
