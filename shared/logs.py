"""Logging set-up: one line an event, as text for a person or JSON for a collector."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO, cast

import structlog


class PatientHandler(logging.StreamHandler[TextIO]):
    """Drops lines that can't be written, as on a full disk, and tells how many once one can."""

    num_lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; before it, how many were lost."""
        if self.num_lost and record.name != __name__:
            num_lost, self.num_lost = self.num_lost, 0
            logging.getLogger(__name__).warning("%d log lines could not be written", num_lost)
            if self.num_lost:
                self.num_lost += num_lost - 1
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Count a line that could not be written; any other failure is a bug and is shown."""
        if isinstance(sys.exception(), OSError):
            self.num_lost += 1
        else:
            super().handleError(record)


def configure_logging(*, service: str, log_format: str, level: str) -> None:
    """Send structlog and the standard library's logging through one renderer to stderr.

    service: bound to every line. log_format: "text" or "json". level: "debug" to "error".
    """
    shared_processors: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            *shared_processors,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        cache_logger_on_first_use=True,
    )
    handler = PatientHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared_processors,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *([structlog.processors.format_exc_info] if log_format == "json" else []),
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("aiohttp.access", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    quiet_libraries()
    structlog.contextvars.bind_contextvars(service=service)


def quiet_libraries() -> None:
    """Keep diffusers and transformers from remarks on what is no error, here and in subprocesses.

    They print them past our logging: on optional packages that nobody here needs, on prompts whose
    cut we tell the client of. For before their import; a variable that is set already stays.
    """
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")


def get_logger() -> structlog.stdlib.BoundLogger:
    """The logger; pass facts as keyword arguments, not inside the sentence."""
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger())
