"""The start and the end that all services share: settings, logs, metrics, signals, exit code."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Protocol, TypeVar

import uvloop
from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.errors import EXIT_CONFIGURATION, ConfigurationError, SynerDiffError
from shared.logs import configure_logging, get_logger
from shared.probe import serve_probe
from shared.settings import ServiceSettings, load_settings
from shared.streams import connect

STOP_PATIENCE_S = 20.0
"""How long a service that was told to stop still waits for a store that is full."""


class Service(Protocol):
    """What a service has to offer: run until stopped."""

    async def run(self) -> None:
        """Serve until `stop` is called."""
        ...

    def stop(self) -> None:
        """Ask `run` to end; safe to call from a signal handler of the event loop."""
        ...


S = TypeVar("S", bound=ServiceSettings)


def run_service(
    name: str,
    settings_kind: type[S],
    make_service: Callable[[Redis, S], Service],
    *,
    is_patient: bool = True,
) -> None:
    """Read the settings, serve until SIGTERM or SIGINT, and exit.

    With 0 if stopped, with `EXIT_CONFIGURATION` where another start would fail alike, with 1 on any
    other error. is_patient: whether it waits while the store is full or otherwise paused, as in
    `connect`.
    """
    try:
        settings = load_settings(settings_kind)
    except SynerDiffError as error:
        print(f"{name}: {error}", file=sys.stderr)  # noqa: T201 - there is no log yet
        sys.exit(EXIT_CONFIGURATION)
    configure_logging(service=name, log_format=settings.log_format, level=settings.log_level)
    log = get_logger()
    log.info("starting", settings=settings.model_dump(mode="json"))
    serve_probe(settings.metrics_port)

    async def serve() -> None:
        redis = connect(settings.redis_url, is_patient=is_patient)
        try:
            service = make_service(redis, settings)
            loop = asyncio.get_running_loop()

            def stop() -> None:
                redis.patience.end_in(STOP_PATIENCE_S)
                service.stop()

            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop)
            await service.run()
        finally:
            await redis.aclose()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())
    except (SynerDiffError, RedisError, ExceptionGroup) as error:
        cause = _expected_cause(error)
        if cause is None:
            raise
        code = getattr(cause, "code", "store_unavailable")
        log.error("stopped", error=str(cause), code=code)  # noqa: TRY400 - it says all
        sys.exit(EXIT_CONFIGURATION if isinstance(cause, ConfigurationError) else 1)
    log.info("stopped")


def _expected_cause(error: Exception) -> SynerDiffError | RedisError | None:
    """What a line says better than a traceback: our own errors and the store's, grouped or not."""
    if isinstance(error, SynerDiffError | RedisError):
        return error
    if not isinstance(error, ExceptionGroup):
        return None
    causes = [_expected_cause(inner) for inner in error.exceptions]
    return causes[0] if all(causes) else None
