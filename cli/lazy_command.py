"""Commands whose module is imported only when they run, their options read from it then."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import typer

from shared.errors import ConfigurationError


def load_function(target: str, *, missing: str = "") -> Callable[..., Any]:
    """Return the function that "module:function" names.

    Args:
        target: Is imported for this.
        missing: What to say when a package it needs is not installed.

    Raises:
        ConfigurationError: Such a package is missing.
    """
    from shared.logs import quiet_libraries  # noqa: PLC0415 (--help must not wait)

    quiet_libraries()
    module_name, _, function_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = f" ({missing})" if missing else ""
        raise ConfigurationError(f"no module named {error.name!r}{hint}") from error
    function: Callable[..., Any] = getattr(module, function_name)
    return function


def add_lazy_command(
    app: typer.Typer, *, name: str, target: str, summary: str, missing: str = ""
) -> None:
    """Add the function `target` ("module:function") to `app` as the command `name`.

    The function's parameters are its options, as typer has it. A mapping that it returns is
    printed as the last line, in JSON.

    Args:
        app: Gets the command.
        name: Of the command.
        target: Is imported when the command runs.
        summary: For the list of commands; the function's own docstring is its full help.
        missing: What to say when a package it needs is not installed.
    """

    def run(context: typer.Context) -> None:
        function = load_function(target, missing=missing)
        own = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        own.command(name=name)(function)
        command = typer.main.get_command(own)
        outcome = command(args=context.args, prog_name=context.command_path, standalone_mode=False)
        if isinstance(outcome, Mapping):
            typer.echo(json.dumps(outcome))

    app.command(
        name=name,
        help=summary,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(run)
