"""`synerdiff up` where it can't run: one sentence, soon, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from redis_server import RedisServer

from cli.data_folder import DataFolder
from cli.stack import EMBEDDED_MODEL

TIMEOUT_S = 60.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be spoilt."""
    return shutil.copytree(EMBEDDED_MODEL, tmp_path / "model")


def up(*options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli", "up", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        env={**os.environ, **environment},
    )


def is_used(data_dir: Path) -> bool:
    """Whether anything runs with the folder, or shared memory has anything of it."""
    return DataFolder(path=data_dir).metrics.exists() or any(
        str(data_dir) in " ".join(process.info["cmdline"] or ())
        for process in psutil.process_iter(["cmdline"])
    )


def assert_refused(
    data_dir: Path, words: str, *options: str | Path, port: str = "0", **environment: str
) -> None:
    existed = data_dir.exists()
    answer = up("--port", port, "--data-dir", data_dir, *options, **environment)
    assert answer.returncode == 1, answer.stdout
    (sentence,) = answer.stderr.splitlines()
    assert sentence.startswith("error: ")
    assert words in sentence
    assert data_dir.exists() == existed
    assert not is_used(data_dir)


# --- folders ------------------------------------------------------------------------------------


def test_a_data_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "d").touch()
    assert_refused(tmp_path / "d", "--data-dir")


@pytest.mark.parametrize("name", ["redis", "logs"])
def test_a_data_folder_whose_parts_are_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).touch()
    assert_refused(tmp_path / "d", "--data-dir")


@pytest.mark.parametrize("folder", ["/proc/synerdiff", f"/tmp/{'x' * 300}", f"/tmp{'/x' * 2500}"])
def test_a_data_folder_that_cannot_be_made(folder: str) -> None:
    answer = up("--port", "0", "--data-dir", folder)
    assert answer.returncode == 1
    (sentence,) = answer.stderr.splitlines()
    assert "--data-dir" in sentence


def test_parents_that_were_made_in_vain_are_gone(tmp_path: Path) -> None:
    assert_refused(tmp_path / "a" / "b" / "d", "no server's URL", "--redis-url", "http://x")
    assert not (tmp_path / "a").exists()


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system of its own at the folder, where that is allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", *options, "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("mounting is not allowed")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_data_folder_on_a_file_system_that_is_read_only(tmp_path: Path) -> None:
    with mounted(tmp_path / "m", "-o", "ro"):
        assert_refused(tmp_path / "m" / "d", "Read-only file system")


def test_a_data_folder_on_a_disk_that_is_full(tmp_path: Path) -> None:
    with mounted(tmp_path / "m", "-o", "size=64k"):
        assert_refused(tmp_path / "m" / "d", "disk full")


def test_shared_memory_that_is_too_small(tmp_path: Path) -> None:
    assert_refused(tmp_path / "d", "--shm-size", SYNERDIFF_POOL_SLOTS="100000000")


def test_data_that_is_damaged(tmp_path: Path) -> None:
    files = tmp_path / "d" / "redis" / "appendonlydir"
    files.mkdir(parents=True)
    (files / "appendonly.aof.manifest").write_text("file appendonly.aof.1.base.aof seq 1 type b\n")
    (files / "appendonly.aof.1.base.aof").write_text("nonsense\n")
    assert_refused(tmp_path / "d", "redis can't run: Bad file format")


def test_data_that_no_server_here_reads(tmp_path: Path) -> None:
    files = tmp_path / "d" / "redis" / "appendonlydir"
    files.mkdir(parents=True)
    (files / "appendonly.aof.manifest").write_text("file appendonly.aof.1.base.rdb seq 1 type b\n")
    (files / "appendonly.aof.1.base.rdb").write_bytes(b"REDIS0079")
    path = os.environ["PATH"] if not shutil.which("redis-server") else "/nowhere"
    assert_refused(tmp_path / "d", "Redis snapshot format 79, which no server here", PATH=path)


# --- addresses ----------------------------------------------------------------------------------


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert_refused(tmp_path / "d", f"port {port} (Address already in use)", port=port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "x" * 70, "a..b"])
def test_a_host_that_is_none_of_ours(tmp_path: Path, host: str) -> None:
    assert_refused(tmp_path / "d", "--host", "--host", host)


# --- models -------------------------------------------------------------------------------------


def test_a_model_folder_that_is_missing(tmp_path: Path) -> None:
    assert_refused(tmp_path / "d", "--model", "--model", tmp_path / "nothing")


def _empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def _of_another_pipeline(model: Path) -> None:
    (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')


def _truncated(model: Path) -> None:
    weights = next((model / "unet").glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)


@pytest.mark.parametrize("spoil", [_empty, _of_another_pipeline, _truncated])
def test_a_model_that_cannot_be_served(
    tmp_path: Path, model: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(model)
    assert_refused(tmp_path / "d", "--model", "--model", model)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SYNERDIFF_PORT", "eighty"),
        ("SYNERDIFF_DTYPE", "float7"),
        ("SYNERDIFF_DEVICE", "banana"),
        ("SYNERDIFF_POLICY", "best"),
        ("SYNERDIFF_LOG_LEVEL", "loud"),
        ("SYNERDIFF_POOL_SLOTS", "-1"),
        ("SYNERDIFF_WARM_UP_SIZES", "large"),
        ("SYNERDIFF_REDIS_URL", "http://localhost"),
    ],
)
def test_a_setting_that_is_wrong(tmp_path: Path, name: str, value: str) -> None:
    words = value if name == "SYNERDIFF_REDIS_URL" else f"{name}={value!r}"
    options = () if name == "SYNERDIFF_PORT" else ("--port", "0")
    answer = up(*options, "--data-dir", tmp_path / "d", **{name: value})
    assert answer.returncode == 1
    (sentence,) = answer.stderr.splitlines()
    assert words in sentence
    assert not (tmp_path / "d").exists()


# --- servers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "redis://localhost:port",
        "redis://127.0.0.1:1",
        "unix:///no/such/socket",
        "rediss://127.0.0.1:1?ssl_ca_certs=/no/such/file",
    ],
)
def test_a_redis_url_where_there_is_none(tmp_path: Path, url: str) -> None:
    assert_refused(tmp_path / "d", "", "--redis-url", url)


@contextmanager
def talker(greeting: bytes) -> Iterator[int]:
    """A port where somebody says something that no Redis says, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with ExitStack() as kept:
                while True:
                    try:
                        connection = kept.enter_context(server.accept()[0])
                    except OSError:
                        return
                    with suppress(OSError):
                        connection.sendall(greeting)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_redis_url_of_something_else(tmp_path: Path, greeting: bytes) -> None:
    with talker(greeting) as port:
        assert_refused(
            tmp_path / "d", f"127.0.0.1:{port}", "--redis-url", f"redis://127.0.0.1:{port}"
        )


def test_a_server_that_wants_another_password_which_is_not_shown(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    with redis_server.client() as client:
        client.config_set("requirepass", "right")
        try:
            url = redis_server.url.replace("unix://", "unix://:wrong-secret@")
            answer = up("--port", "0", "--data-dir", tmp_path / "d", "--redis-url", url)
        finally:
            client.config_set("requirepass", "")
    assert answer.returncode == 1
    (sentence,) = answer.stderr.splitlines()
    assert "invalid username-password pair" in sentence
    assert "wrong-secret" not in sentence


def test_a_server_that_only_copies_another(tmp_path: Path, redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        try:
            assert_refused(tmp_path / "d", "refuses us", "--redis-url", redis_server.url)
        finally:
            client.execute_command("REPLICAOF", "NO", "ONE")
