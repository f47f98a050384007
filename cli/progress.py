"""Progress bars of `synerdiff generate`: one per picture, nothing where there is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich import progress as bars
from rich.console import Console

from launch.client import Progress


@contextlib.contextmanager
def picture_progress(num_pictures: int) -> Iterator[Callable[[int, Progress], None]]:
    """Show a bar for each picture; yields what takes the news of each, from any thread."""
    console = Console(stderr=True)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[note]}"),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as display:
        tasks = [
            display.add_task(
                f"picture {i + 1}" if num_pictures > 1 else "picture", total=None, note="waiting"
            )
            for i in range(num_pictures)
        ]

        def show(index: int, news: Progress) -> None:
            display.update(
                tasks[index], total=news.num_steps or None, completed=news.step, note=describe(news)
            )

        yield show


def describe(news: Progress) -> str:
    """Return a few words on how far a picture is."""
    if news.queue_position:
        return f"number {news.queue_position} in the queue"
    if not news.num_steps:
        return news.state
    if news.step >= news.num_steps:
        return "decoding"
    return f"step {news.step}/{news.num_steps}"
