"""`synerdiff up`: Redis and the four services on this machine, supervised."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def up(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0 for any.", show_default="8000")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A diffusers folder.", show_default="the embedded model")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto"),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="The scheduler's policy.", show_default=False)
    ] = None,
    unet_workers: Annotated[int, typer.Option(min=1, help="UNet worker processes.")] = 1,
    vae_workers: Annotated[int, typer.Option(min=1, help="VAE worker processes.")] = 1,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where data and logs go.", show_default="~/.local/share/synerdiff"),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(help="A running server to use.", show_default="a private one is started"),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    verbose: Annotated[bool, typer.Option(help="Show all that the services log.")] = False,
) -> None:
    """Start everything on this machine, and keep it running until Ctrl-C.

    Every setting may also come from its SYNERDIFF_* environment variable; options win.
    """
    # Here, not above: `synerdiff --help` must not wait for them.
    from cli.running_stack import run_stack  # noqa: PLC0415
    from launch.stack import StackOptions  # noqa: PLC0415

    options = StackOptions(
        host=host,
        port=port,
        model=model,
        device=device,
        dtype=dtype,
        policy=policy,
        unet_workers=unet_workers,
        vae_workers=vae_workers,
        log_format=log_format,
        log_level=log_level,
    )
    raise typer.Exit(run_stack(options, data_dir=data_dir, redis_url=redis_url, verbose=verbose))
