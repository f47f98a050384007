from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from cli.__main__ import app
from cli.client import GatewayError, Progress, request_picture
from cli.data_folder import DataFolder
from cli.embedded_redis import choose_maxmemory_bytes, choose_socket, find_redis_binary
from cli.generate import choose_paths
from cli.lazy_command import add_lazy_command, load_function
from cli.progress import describe
from cli.stack import Stack, StackOptions, prepare_stack, reserve_port
from shared.errors import ConfigurationError

PNG = b"\x89PNG not really"


class StandInGateway(BaseHTTPRequestHandler):
    """Answers like the gateway's stream; remembers what it was asked."""

    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        if body["prompt"] == "refused":
            self._send(400, json.dumps({"error": {"message": "'size' is odd."}}))
            return
        event = {
            "b64_json": base64.b64encode(PNG).decode(),
            "seed": body.get("seed", 7),
            "size": "64x64",
            "warnings": ["The prompt was cut."],
        }
        if body["prompt"] == "fails late":
            event = {"error": {"message": "not finite"}}
        progress = {"state": "running", "step": 3, "num_steps": 4, "queue_position": None}
        self._send(200, f": {json.dumps(progress)}\n\n: hm\n\ndata: {json.dumps(event)}\n\n")

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway_url() -> Iterator[str]:
    StandInGateway.bodies.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), StandInGateway) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli", *arguments], capture_output=True, text=True, check=False
    )


def test_help_is_there_without_torch_or_redis_or_a_second_of_waiting() -> None:
    source = (
        "import sys; from cli.__main__ import app; from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0\n"
        "print(sorted({'torch', 'redis', 'pydantic', 'aiohttp', 'asyncio'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", source], capture_output=True, check=True)
    assert answer.stdout.decode().strip() == "[]"


def test_version_is_told() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.output.startswith("synerdiff 0.")


def test_a_lazy_command_takes_its_options_from_its_function_and_ends_with_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lazy_example.py").write_text(
        "def run(seed: int = 0, quick: bool = False) -> dict[str, object]:\n"
        "    print('measuring')\n"
        "    return {'seed': seed, 'quick': quick}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    lazy = type(app)()
    add_lazy_command(lazy, name="example", target="lazy_example:run", summary="An example.")
    lazy.command(name="other")(lambda: None)

    result = CliRunner().invoke(lazy, ["example", "--seed", "5", "--quick"])
    assert result.exit_code == 0, result.output
    first, last = result.output.splitlines()
    assert first == "measuring"
    assert json.loads(last) == {"seed": 5, "quick": True}
    assert "--seed" in CliRunner().invoke(lazy, ["example", "--help"]).output
    assert CliRunner().invoke(lazy, ["example", "--nonsense"]).exit_code == 2


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"no_such_package.*pip install it"):
        load_function("no_such_package:run", missing="pip install it")


def test_libraries_remarks_are_off_for_commands_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "info")
    monkeypatch.delenv("DIFFUSERS_VERBOSITY")
    load_function("json:dumps")
    assert os.environ["DIFFUSERS_VERBOSITY"] == "error"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


def test_a_simulation_finds_its_profile_from_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["simulate", "--rate", "1", "--duration", "4"])
    assert result.exit_code == 0, result.output


def test_a_generated_picture_lands_in_its_file(gateway_url: str, tmp_path: Path) -> None:
    path = tmp_path / "apple.webp"
    options = ["--steps", "4", "--seed", "9", "--url", gateway_url]
    result = CliRunner().invoke(app, ["generate", "red apple", "-o", str(path), *options])
    assert result.exit_code == 0, result.output
    assert path.read_bytes() == PNG
    assert "seed 9" in result.output
    assert "The prompt was cut." in result.output
    assert StandInGateway.bodies == [
        {
            "prompt": "red apple",
            "output_format": "webp",
            "num_inference_steps": 4,
            "seed": 9,
            "stream": True,
        }
    ]


def test_several_pictures_have_consecutive_seeds_and_numbered_files(
    gateway_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "apple.png"
    options = ["--n", "3", "--seed", "9", "--url", gateway_url]
    result = CliRunner().invoke(app, ["generate", "apple", "-o", str(path), *options])
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "apple-1.png",
        "apple-2.png",
        "apple-3.png",
    ]
    assert sorted(body["seed"] for body in StandInGateway.bodies) == [9, 10, 11]


def test_without_an_output_the_prompt_names_the_file() -> None:
    assert choose_paths(None, "A red apple, please!", 1, "jpeg") == [Path("a-red-apple-please.jpg")]
    assert choose_paths(None, "!?", 1, "png") == [Path("picture.png")]


def test_an_output_in_no_folder_is_refused_before_anything_is_made() -> None:
    with pytest.raises(ConfigurationError, match="--output"):
        choose_paths(Path("/no/such/folder/apple.png"), "apple", 1, "png")


@pytest.mark.parametrize(
    ("prompt", "message"), [("refused", "'size' is odd."), ("fails late", "not finite")]
)
def test_the_gateways_own_words_reach_the_user(gateway_url: str, prompt: str, message: str) -> None:
    with pytest.raises(GatewayError, match=message):
        request_picture(gateway_url, {"prompt": prompt}, lambda _: None)


def test_progress_is_reported_and_other_comments_are_not(gateway_url: str) -> None:
    news: list[Progress] = []
    request_picture(gateway_url, {"prompt": "apple"}, news.append)
    assert [describe(item) for item in news] == ["step 3/4"]


def test_when_nothing_answers_generate_says_how_to_start_a_stack(tmp_path: Path) -> None:
    port = reserve_port("127.0.0.1", 0)
    answer = run("generate", "apple", "-o", tmp_path / "a.png", "--url", f"http://127.0.0.1:{port}")
    assert answer.returncode == 1
    assert "synerdiff up" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://host:port"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(GatewayError, match="is no address"):
        request_picture(url, {"prompt": "apple"}, lambda _: None)


@pytest.fixture
def own_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_port_in_use_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        options = ("--port", str(port), "--data-dir", tmp_path / "d")
        answer = run("up", *options)
    assert answer.returncode == 1
    assert f"port {port}" in answer.stderr
    assert "--port" in answer.stderr
    assert answer.stdout == ""


@pytest.mark.usefixtures("own_environment")
def test_a_missing_model_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--model"):
        prepare_stack(StackOptions(port=0, model=tmp_path))


@pytest.mark.usefixtures("own_environment")
def test_a_bad_setting_is_named_with_what_it_should_be() -> None:
    with pytest.raises(ConfigurationError, match=r"SYNERDIFF_DTYPE='float7'.*bfloat16"):
        prepare_stack(StackOptions(port=0, dtype="float7"))


def test_a_data_folder_has_one_stack_at_a_time(tmp_path: Path) -> None:
    folder = DataFolder(path=tmp_path / "d")
    with (
        folder.locked("process 1 (http://127.0.0.1:8000)"),
        pytest.raises(ConfigurationError, match=r"process 1 .*--data-dir"),
        folder.locked("process 2"),
    ):
        pass
    with folder.locked("process 3"):
        folder.create()
    assert (folder.logs.stat().st_mode & 0o777) == 0o700


def test_metrics_are_of_one_run(tmp_path: Path) -> None:
    folder = DataFolder(path=tmp_path / "d")
    with folder.locked("process 1"):
        folder.create()
        (folder.metrics / "counter_1.db").touch()
        folder.create()
        assert list(folder.metrics.iterdir()) == []
    assert not folder.metrics.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigurationError, match="--data-dir"),
        DataFolder(path=tmp_path / "file" / "d").locked("x"),
    ):
        pass


def test_the_wheels_server_is_found_when_the_path_has_none(tmp_path: Path) -> None:
    binary = find_redis_binary(search_path=str(tmp_path))
    assert binary.path.name == "valkey-server"
    assert str(binary).startswith("valkey-server ")


def test_a_server_that_is_too_old_or_does_not_run_is_passed_over(tmp_path: Path) -> None:
    for name, source in (
        ("redis-server", "echo Redis server v=6.2.1 sha=0"),
        ("valkey-server", "exit 1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{source}\n")
        (tmp_path / name).chmod(0o755)
    search_path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    assert find_redis_binary(search_path=search_path).path.parent != tmp_path


def test_a_socket_with_too_long_a_name_goes_elsewhere(tmp_path: Path) -> None:
    assert choose_socket(Path("/data"), tmp_path) == Path("/data/redis.sock")
    assert choose_socket(Path("/data") / ("x" * 200), tmp_path).parent == tmp_path


def test_redis_gets_a_quarter_of_the_memory_within_limits() -> None:
    gib = 1 << 30
    assert choose_maxmemory_bytes(gib // 2) == gib // 4
    assert choose_maxmemory_bytes(8 * gib) == 2 * gib
    assert choose_maxmemory_bytes(512 * gib) == 4 * gib


def make_stack(**changes: Any) -> Stack:
    facts: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 8000,
        "model": Path("model"),
        "policy": "",
        "unet_workers": ("unet-0", "unet-1"),
        "vae_workers": ("vae-0",),
        "environment": {"PATH": "/bin"},
    }
    return Stack(**facts | changes)


def test_every_worker_has_a_name_of_its_own_and_sleeping_threads() -> None:
    services = make_stack().services("unix:///r.sock", Path("/metrics"))
    assert [service.name for service in services] == [
        "gateway",
        "scheduler",
        "unet-0",
        "unet-1",
        "vae-0",
    ]
    for service in services:
        environment = service.environment
        assert environment["SYNERDIFF_REDIS_URL"] == "unix:///r.sock"
        assert environment["PROMETHEUS_MULTIPROC_DIR"] == "/metrics"
        is_worker = service.name[-1].isdigit()
        assert environment.get("SYNERDIFF_WORKER_ID") == (service.name if is_worker else None)
        assert ("OMP_WAIT_POLICY" in environment) == is_worker
    ranks = {service.name: service.stop_rank for service in services}
    assert ranks["gateway"] < ranks["unet-0"] == ranks["unet-1"] < ranks["vae-0"]
    assert ranks["vae-0"] < ranks["scheduler"]


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000"), ("h", "http://h:8000")],
)
def test_the_address_shown_can_be_opened_on_this_machine(host: str, url: str) -> None:
    assert make_stack(host=host).url == url


def test_only_options_that_were_given_become_variables() -> None:
    assert StackOptions(port=8001, policy="x").environment() == {
        "SYNERDIFF_PORT": "8001",
        "SYNERDIFF_POLICY": "x",
    }
