"""The folder in which one stack keeps everything: Redis' data, logs, socket, lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cli.disk import full_disk
from shared.errors import ConfigurationError
from shared.host import SHM_DIRECTORY

_LOCK_PATIENCE_S: Final = 2.0


def default_data_folder() -> Path:
    """This user's own folder for data, as the XDG base directories have it."""
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")  # noqa: PTH111
    return Path(base) / "synerdiff"


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
        """What `PROMETHEUS_MULTIPROC_DIR` names: of this run only.

        In memory where that is possible, since a disk may be full.
        """
        if not os.access(SHM_DIRECTORY, os.W_OK | os.X_OK):
            return self.path / "metrics"
        digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:16]
        return SHM_DIRECTORY / f"synerdiff_metrics-{os.geteuid()}-{digest}"

    @property
    def lock(self) -> Path:
        """Locked by the stack that runs here, whose process id and address it names."""
        return self.path / "lock"

    def create(self) -> None:
        """Make the folder and what is in it, readable by its owner only; metrics begin empty.

        Raises:
            ConfigurationError: It can't be written.
        """
        self._remove_metrics()
        try:
            for folder in (self.path, self.redis, self.logs, self.metrics):
                folder.mkdir(mode=0o700, parents=True, exist_ok=folder != self.metrics)
            for folder in (self.redis, self.logs):
                _try_to_write(folder)
        except OSError as error:
            raise self._unusable(error) from error
        if problem := full_disk([self.path]):
            raise ConfigurationError(f"{problem}; make room, or choose another with --data-dir")

    def _remove_metrics(self) -> None:
        """Remove what only a run needs."""
        shutil.rmtree(self.metrics, ignore_errors=True)

    def _unusable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(
            f"data folder {self.path} can't be used ({error.strerror}: {error.filename}); "
            "choose another with --data-dir"
        )

    @contextlib.contextmanager
    def locked(self, note: str) -> Iterator[int]:
        """Hold the folder's lock; yields its descriptor. Afterwards nothing of one run is left.

        A child that inherits the descriptor holds the lock as well, so that a folder is not free
        before a server that writes in it is gone. A holder that is just going is waited for.

        note: tells others who holds it.

        A folder that is made for this goes again if the body refuses to start and nothing has run.

        Raises:
            ConfigurationError: Another stack holds it, who is named; or it can't be written.
        """
        made: list[Path] = []
        try:
            made += [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            _remove(made)
            raise self._unusable(error) from error
        try:
            self._take(descriptor)
            with contextlib.suppress(OSError):  # there is no room for it
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, note.encode(), 0)
            try:
                yield descriptor
            finally:
                self._remove_metrics()
        except ConfigurationError:
            if made and not _has_files(self.logs):
                shutil.rmtree(self.path, ignore_errors=True)
                _remove(made)
            raise
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
                raise ConfigurationError(
                    f"data folder {self.path} is in use by {holder}; stop that one, "
                    "or start a second stack with --data-dir and --port of its own"
                ) from error
            except OSError as error:
                raise self._unusable(error) from error
            else:
                return


def _try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _remove(folders: list[Path]) -> None:
    """Remove folders that are empty, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
