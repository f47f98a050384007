"""`synerdiff settings`: every setting with what it may be, its default and its meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import typer

from shared.settings import (
    PREFIX,
    GatewaySettings,
    SchedulerSettings,
    ServiceSettings,
    UnetWorkerSettings,
    VaeWorkerSettings,
    WorkerSettings,
    allowed_values,
)

_ROOT: Final = Path(__file__).resolve().parents[1]
_SECTIONS: Final[Mapping[str, type[ServiceSettings]]] = {
    "Every service": ServiceSettings,
    "Gateway": GatewaySettings,
    "Scheduler": SchedulerSettings,
    "UNet and VAE workers": WorkerSettings,
    "UNet workers": UnetWorkerSettings,
    "VAE workers": VaeWorkerSettings,
}
_HEAD: Final = """\
# Settings

Each service reads its settings once at its start, from environment variables; a wrong value stops
the start and is named. `synerdiff up` hands its own environment to all of them, and its options
win. Where it starts the services itself, it chooses `SYNERDIFF_REDIS_URL`, `SYNERDIFF_WORKER_ID`,
`SYNERDIFF_METRICS_PORT` and `SYNERDIFF_DRAIN_TIMEOUT_S`. `synerdiff settings` prints this page.
"""


def settings() -> None:
    """Print every setting as a page in Markdown: what it may be, its default and its meaning."""
    typer.echo(settings_page(), nl=False)


def settings_page() -> str:
    """Return the page."""
    return "\n".join([_HEAD, *_sections()])


def _sections() -> Iterator[str]:
    for title, kind in _SECTIONS.items():
        properties = kind.model_json_schema()["properties"]
        yield f"## {title}\n"
        yield "| variable | what it may be | default | meaning |"
        yield "|---|---|---|---|"
        for name in kind.__annotations__:
            if field := kind.model_fields.get(name):
                meaning = (field.description or "").replace("\n", " ")
                cells = (
                    f"`{PREFIX}{name.upper()}`",
                    _allowed(properties[name]),
                    _default(field.default),
                    meaning,
                )
                yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
        yield ""


def _allowed(schema: dict[str, Any]) -> str:
    return "a path" if schema.get("format") == "path" else allowed_values(schema)


def _default(value: object) -> str:
    """Return a default as the variable would say it; a path of ours from the project's folder."""
    if value is None:
        return "left out"
    if isinstance(value, Path) and value.is_relative_to(_ROOT):
        value = value.relative_to(_ROOT)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else "empty"
