"""`synerdiff doctor`: what this machine has and lacks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cli.diagnosis import Diagnosis

_STYLES = {"good": "green", "limited": "yellow", "missing": "bold red"}


def doctor(
    model: Annotated[
        Path | None, typer.Option(help="A diffusers folder.", show_default="the embedded model")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what this machine has and lacks, and what follows; exit code 1 if it can't serve."""
    from cli.data_folder import default_data_folder  # noqa: PLC0415 (--help must not wait)
    from cli.diagnosis import diagnose  # noqa: PLC0415
    from cli.stack import EMBEDDED_MODEL  # noqa: PLC0415

    diagnosis = diagnose(model or EMBEDDED_MODEL, default_data_folder())
    if as_json:
        typer.echo(json.dumps({"is_able": diagnosis.is_able, **asdict(diagnosis)}, indent=2))
    else:
        _print(diagnosis)
    raise typer.Exit(0 if diagnosis.is_able else 1)


def _print(diagnosis: Diagnosis) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "here", "", "what follows"):
        table.add_column(heading, overflow="fold")
    for finding in diagnosis.findings:
        table.add_row(
            Text(finding.subject, style="bold"),
            Text(finding.value),
            Text(finding.verdict, style=_STYLES[finding.verdict]),
            Text(finding.consequence),
        )
    console = Console()
    console.print(table)
    choices = diagnosis.choices
    console.print(
        Text(
            f"\nWorkers will run on {choices.device} in {choices.dtype} with {choices.threads} "
            f"threads, latents going by {choices.transport}.\n"
        ),
        Text("This machine can serve.", style="bold green")
        if diagnosis.is_able
        else Text("This machine can't serve before what is missing is there.", style="bold red"),
    )
