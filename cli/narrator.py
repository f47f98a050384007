"""What `synerdiff up` says on the terminal.

A terminal that is gone, or a file that can't be written, costs what is said and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cli.service_log import LogLine
from cli.supervisor import Death


class Narrator:
    """Prints one line per event; plain text where there is no terminal.

    Args:
        console: Where to print.
        is_verbose: Show every line that the services log, not only warnings and errors.
    """

    def __init__(self, console: Console, *, is_verbose: bool) -> None:
        self._console = console
        self._is_verbose = is_verbose

    def say(self, text: str, *, style: str = "") -> None:
        """Print a line."""
        self._print(Text(text, style=style))

    def service_up(self, name: str, detail: str) -> None:
        """A service has come up."""
        self.say_of(name, detail, style="green")

    def say_of(self, name: str, text: str, *, style: str = "") -> None:
        """Print a line about a service."""
        self._print(Text.assemble((f"  {name:<10} ", style or "bold"), text))

    def _print(self, text: Text) -> None:
        with contextlib.suppress(OSError):
            self._console.print(text, soft_wrap=True)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show that something goes on, while lines may be printed above it."""
        if self._console.is_terminal:
            with self._console.status(text):
                yield
        else:
            yield

    def log_line(self, service: str, line: LogLine) -> None:
        """A service has logged a line. Redis' own are for its log file."""
        if self._is_verbose or (line.is_alarming and service != "redis"):
            style = {"warning": "yellow", "error": "red", "critical": "red"}.get(line.level, "dim")
            self.say_of(service, line.text, style=style)

    def death(self, death: Death, log_folder: Path) -> None:
        """A service has ended unasked; one that is final is told as the end of all."""
        if death.restart_in_s is not None:
            last = f": {death.last_lines[-1]}" if death.exit_code > 0 and death.last_lines else ""
            why = f", {death.hardship}" if death.hardship else ""
            self.say_of(death.service, f"ended ({death.cause}{why}){last}", style="yellow")
            self.say_of(death.service, "starting it again", style="yellow")
        elif not death.is_final:
            self.say_of(
                death.service, f"keeps ending ({death.cause}); its last lines:", style="red"
            )
            for text in death.last_lines:
                self.say(f"    {text}")
            self.say(f"    (more in {log_folder / death.service}.log)")
