"""`synerdiff doctor`: what this machine has and lacks."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from cli.diagnosis import Diagnosis
    from cli.pairs import Pair

_STYLES = {"good": "green", "limited": "yellow", "missing": "bold red"}
_TRANSPORT_STYLES = {"cuda_ipc": "green", "shm": "green", "inline": "yellow"}


def doctor(
    model: Annotated[
        Path | None, typer.Option(help="A diffusers folder.", show_default="the embedded model")
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            envvar="SYNERDIFF_REDIS_URL",
            help="A running service's Redis: shows which transport its workers use.",
            show_default="that of `synerdiff up`, if it runs",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what this machine has and lacks, and what follows; exit code 1 if it can't serve."""
    from cli.diagnosis import diagnose  # noqa: PLC0415
    from launch.data_folder import default_data_folder  # noqa: PLC0415 (--help must not wait)
    from launch.stack import EMBEDDED_MODEL  # noqa: PLC0415

    diagnosis = diagnose(model or EMBEDDED_MODEL, default_data_folder())
    pairs = _find_pairs(redis_url)
    if as_json:
        report = {"is_able": diagnosis.is_able, **asdict(diagnosis)}
        typer.echo(json.dumps({**report, "pairs": [asdict(pair) for pair in pairs]}, indent=2))
    else:
        _print(diagnosis)
        _print_pairs(pairs)
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
        sep="",
    )


def _find_pairs(redis_url: str | None) -> tuple[Pair, ...]:
    """Return the pairs of the service asked for, or of the one that `synerdiff up` runs."""
    from cli.pairs import pair_up, read_workers  # noqa: PLC0415
    from launch.data_folder import default_data_folder  # noqa: PLC0415
    from launch.embedded_redis import running_url  # noqa: PLC0415

    if redis_url:
        return pair_up(read_workers(redis_url))
    with contextlib.suppress(ConfigurationError):
        url = running_url(default_data_folder())
        return pair_up(read_workers(url)) if url else ()
    return ()


def _print_pairs(pairs: tuple[Pair, ...]) -> None:
    if not pairs:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("latents from", "to", "go by", "because they are"):
        table.add_column(heading, overflow="fold")
    for pair in pairs:
        transport = Text(pair.transport, style=_TRANSPORT_STYLES[pair.transport])
        table.add_row(pair.unet, pair.vae, transport, pair.reason)
    Console().print("", table)
