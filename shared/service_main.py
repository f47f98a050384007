"""The start and the end that all services share: settings, logs, metrics, signals, exit code."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Protocol, TypeVar

import uvloop
from redis.asyncio import Redis

from shared.errors import EXIT_CONFIGURATION, ConfigurationError, SynerDiffError
from shared.logs import configure_logging, get_logger
from shared.probe import serve_probe
from shared.settings import ServiceSettings, load_settings
from shared.streams import connect


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
    name: str, settings_kind: type[S], make_service: Callable[[Redis, S], Service]
) -> None:
    """Read the settings, serve until SIGTERM or SIGINT, and exit.

    With 0 if stopped, with `EXIT_CONFIGURATION` where another start would fail alike, with 1 on any
    other error.
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
        redis = connect(settings.redis_url)
        try:
            service = make_service(redis, settings)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, service.stop)
            await service.run()
        finally:
            await redis.aclose()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())
    except* SynerDiffError as group:
        reason = _first(group)
        log.error("stopped", error=str(reason), code=reason.code)  # noqa: TRY400 - it says all
        sys.exit(EXIT_CONFIGURATION if isinstance(reason, ConfigurationError) else 1)
    log.info("stopped")


def _first(group: BaseExceptionGroup[SynerDiffError]) -> SynerDiffError:
    """One of what ended a service's tasks."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SynerDiffError)
    return error
