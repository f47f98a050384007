"""The folder in which one stack keeps everything: Redis' data, logs, metrics, socket, lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import ConfigurationError

_LOCK_PATIENCE_S: Final = 2.0


def default_data_folder() -> Path:
    """This user's own folder for data, as the XDG base directories have it."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path("~/.local/share").expanduser()) / "synerdiff"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFolder:
    """The folder's places. Only the holder of its lock may use them."""

    path: Path

    @property
    def redis(self) -> Path:
        """The server's append-only files: kept from run to run."""
        return self.path / "redis"

    @property
    def logs(self) -> Path:
        """One file per service, and that of the run before."""
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        """What `PROMETHEUS_MULTIPROC_DIR` names: of this run only."""
        return self.path / "metrics"

    @property
    def lock(self) -> Path:
        """Locked by the stack that runs here, whose process id and address it names."""
        return self.path / "lock"

    def create(self) -> None:
        """Make the folder and what is in it, readable by its owner only; metrics begin empty.

        Raises:
            ConfigurationError: It can't be written.
        """
        try:
            shutil.rmtree(self.metrics, ignore_errors=True)
            for folder in (self.path, self.redis, self.logs, self.metrics):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"data folder {self.path} can't be used ({error.strerror}); "
                "choose another with --data-dir"
            ) from error

    @contextlib.contextmanager
    def locked(self, note: str) -> Iterator[int]:
        """Hold the folder's lock; yields its descriptor.

        A child that inherits the descriptor holds the lock as well, so that a folder is not free
        before a server that writes in it is gone. A holder that is just going is waited for.

        note: tells others who holds it.

        Raises:
            ConfigurationError: Another stack holds it; names it.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"data folder {self.path} can't be used ({error.strerror}); "
                "choose another with --data-dir"
            ) from error
        try:
            self._take(descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, note.encode(), 0)
            yield descriptor
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
                raise ConfigurationError(
                    f"data folder {self.path} is in use by {holder}; stop that one, "
                    "or start a second stack with --data-dir and --port of its own"
                ) from error
            else:
                return
