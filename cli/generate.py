"""`synerdiff generate`: pictures from a running gateway."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from launch.client import Picture

DEFAULT_URL: Final = "http://127.0.0.1:8000"
_FORMATS: Final = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write.", show_default="named by the prompt"),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, max=10, help="How many pictures.")] = 1,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the first picture.", show_default="random")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="How closely to follow the prompt.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="One of the model's samplers.")] = None,
    negative: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    image_format: Annotated[
        str | None,
        typer.Option("--format", help="png, jpeg or webp.", show_default="the file's ending"),
    ] = None,
    url: Annotated[
        str, typer.Option(envvar="SYNERDIFF_URL", help="Of a running gateway.")
    ] = DEFAULT_URL,
    private: Annotated[
        bool, typer.Option("--up", help="Start a stack for this alone, and stop it again.")
    ] = False,
) -> None:
    """Make pictures and write them to files; several become NAME-1, NAME-2 and so on."""
    chosen_format = image_format or _FORMATS.get(output.suffix.lower() if output else "", "png")
    paths = choose_paths(output, prompt, n, chosen_format)
    wishes = {
        "prompt": prompt,
        "output_format": chosen_format,
        "size": size,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "sampler": sampler,
        "negative_prompt": negative,
    }
    body = {name: value for name, value in wishes.items() if value is not None}
    with ExitStack() as stack:
        if private:
            from launch.private_stack import private_stack  # noqa: PLC0415 (--help must not wait)

            typer.echo("Starting a stack for this ...", err=True)
            url = stack.enter_context(private_stack())
        started_at = time.monotonic()
        pictures = _request_all(url, body, seed, n)
        elapsed_s = time.monotonic() - started_at
    for path, picture in zip(paths, pictures, strict=True):
        _write(path, picture.content)
        typer.echo(f"{path}  {picture.size}, seed {picture.seed}")
    for warning in dict.fromkeys(text for picture in pictures for text in picture.warnings):
        typer.echo(f"note: {warning}", err=True)
    typer.echo(f"{elapsed_s:.1f} s", err=True)


def choose_paths(
    output: Path | None, prompt: str, num_pictures: int, image_format: str
) -> list[Path]:
    """Return where the pictures go: `output`, or a name made of the prompt; numbered if several.

    Raises:
        ConfigurationError: The output's folder is not there.
    """
    if output is None:
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-")
        output = Path(f"{words or 'picture'}.{'jpg' if image_format == 'jpeg' else image_format}")
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigurationError(f"can't write {output}: --output should be a file in a folder")
    if num_pictures == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{i}") for i in range(1, num_pictures + 1)]


def _request_all(
    url: str, body: Mapping[str, Any], seed: int | None, num_pictures: int
) -> list[Picture]:
    """Return the pictures, each from a stream that shows its progress; they share the batches."""
    from cli.progress import picture_progress  # noqa: PLC0415
    from launch.client import (  # noqa: PLC0415 (--help must not wait)
        GatewayUnreachableError,
        Progress,
        request_in_background,
    )

    bodies = [
        {**body, **({} if seed is None else {"seed": seed + index})}
        for index in range(num_pictures)
    ]
    with picture_progress(num_pictures) as show:

        def report_to(index: int) -> Callable[[Progress], None]:
            return lambda progress: show(index, progress)

        try:
            futures = [
                request_in_background(url, own_body, report_to(index))
                for index, own_body in enumerate(bodies)
            ]
            return [future.result() for future in futures]
        except GatewayUnreachableError as error:
            raise GatewayUnreachableError(
                f"{error}; start a stack with `synerdiff up`, name another one with --url, "
                "or add --up to start one for this picture alone"
            ) from error


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigurationError(f"can't write {path}: {error.strerror}") from error
