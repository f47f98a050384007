"""`synerdiff generate`: pictures from a running gateway."""

from __future__ import annotations

import typer


def generate() -> None:
    """Make pictures."""
    raise typer.Exit(1)
