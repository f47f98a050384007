"""The `synerdiff` command. What is slow to import waits inside the command that needs it."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated

import typer

from cli.bench_commands import bench
from cli.doctor import doctor
from cli.generate import generate
from cli.lazy_command import add_lazy_command
from cli.up import up
from shared.errors import SynerDiffError

app = typer.Typer(
    name="synerdiff",
    help="Serve latent diffusion models with step-level continuous batching.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"synerdiff {metadata.version('synerdiff')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Serve latent diffusion models with step-level continuous batching."""


app.command()(up)
app.command()(generate)
app.command()(doctor)
app.add_typer(bench, name="bench")
add_lazy_command(
    app,
    name="settings",
    target="cli.settings:settings",
    summary="Every setting: what it may be, its default and its meaning.",
)
add_lazy_command(
    app,
    name="profile",
    target="bench.profiler:profile",
    summary="Measure what this device can do with a model.",
    missing="a plot needs: pip install 'synerdiff[dev]'",
)
add_lazy_command(
    app,
    name="simulate",
    target="cli.simulate:simulate",
    summary="Serve made-up arrivals with the real scheduler on simulated devices.",
)
add_lazy_command(
    app,
    name="train-emoji",
    target="cli.train_emoji:train_emoji",
    summary="Train the embedded model again, from nothing.",
    missing="training needs its extra: pip install 'synerdiff[train]'",
)


def main() -> None:
    """Run the command; an error of ours is a sentence on stderr and exit code 1."""
    try:
        app()
    except SynerDiffError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
