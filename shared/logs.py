"""Logging set-up: one line an event, as text for a person or JSON for a collector."""

from __future__ import annotations

import logging
import os
import sys
from typing import cast

import structlog


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
    handler = logging.StreamHandler(sys.stderr)
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
