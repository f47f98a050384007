"""A whole stack for one command: started on a free port with data of its own, and gone after it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from launch.client import GatewayError, is_ready
from launch.stack import reserve_port
from launch.supervisor import Service
from shared.settings import to_environment

_POLL_S: Final = 0.2
_STOP_TIMEOUT_S: Final = 60.0


@contextlib.contextmanager
def private_stack(
    *options: str, settings: Mapping[str, object] = MappingProxyType({})
) -> Iterator[str]:
    """Run `synerdiff up`, and yield the gateway's address when it is ready.

    Args:
        options: Of the command, besides.
        settings: Of the services, by their names.

    Raises:
        GatewayError: It did not come up; with what it said.
    """
    port = reserve_port("127.0.0.1", 0)
    with tempfile.TemporaryDirectory(prefix="synerdiff-") as name, tempfile.TemporaryFile() as said:
        up = Service(
            name="up",
            command=(
                *(sys.executable, "-P", "-m", "cli", "up"),
                *("--host", "127.0.0.1", "--port", str(port), "--data-dir", str(Path(name) / "d")),
                *options,
            ),
            environment={**os.environ, **to_environment(settings)},
            death_signal=signal.SIGTERM,
        )
        stack = subprocess.Popen(  # noqa: S603 (our own command)
            up.child_command,
            env=dict(up.environment),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            while not is_ready(url):
                if stack.poll() is not None:
                    said.seek(0)
                    raise GatewayError(
                        "the private stack did not come up:\n" + said.read().decode().strip()
                    )
                time.sleep(_POLL_S)
            yield url
        finally:
            stack.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                stack.wait(_STOP_TIMEOUT_S)
            stack.kill()
            stack.wait()
