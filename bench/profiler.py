"""`synerdiff profile`: what this device can do with a model, measured with the real processes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.report import machine
from bench.side_by_side import Chunks, Forward, Pair, running_pair
from services.scheduler.profile import (
    DecodeTiming,
    Profile,
    SlotKind,
    SlotTiming,
    make_key,
)
from services.scheduler.profile_file import format_profile
from shared.device import choose_device, choose_dtype
from shared.settings import available_threads

ROWS = (1, 2, 4, 6, 8, 12, 16)
BESIDE_ROWS = (2, 4, 8, 16)
BESIDE_CHUNKS = (1, 2, 4, 8)
EMBEDDED_MODEL = Path("models/emoji")

Samples = dict[Any, list[float]]


@dataclass(slots=True, kw_only=True)
class Measurements:
    """Raw samples in seconds, by what was measured."""

    alone: Samples = field(default_factory=dict)
    beside_step: Samples = field(default_factory=dict)
    beside_chunks: Samples = field(default_factory=dict)
    decode: dict[int, list[tuple[float, ...]]] = field(default_factory=dict)
    encode: list[float] = field(default_factory=list)


def thread_splits(threads: int) -> list[tuple[int, int]]:
    """(UNet, VAE) thread counts worth trying side by side: one to half of the cores to decodes."""
    if threads <= 1:
        return [(1, 1)]
    shares = sorted({1, max(1, threads // 4), threads // 2})
    return [(threads - share, share) for share in shares]


def measure(
    pair: Pair,
    *,
    size: tuple[int, int],
    threads: int,
    num_repeats: int,
    rows: Sequence[int] = ROWS,
    say: Callable[[str], None] = print,
) -> Measurements:
    """All timings, every repeat taking each once, so that drift of the machine hits all alike."""
    height, width = size
    found = Measurements()
    alone_threads = sorted({threads, max(1, threads - 1)})
    for repeat in range(-1, num_repeats):  # the first warms up and is dropped
        found = Measurements() if repeat == 0 else found
        say(f"repeat {repeat + 1} of {num_repeats}" if repeat >= 0 else "warming up")
        for count in rows:
            for number in alone_threads:
                forward = Forward(height=height, width=width, rows=count, threads=number)
                found.alone.setdefault((number, count), []).append(pair.forward(forward).seconds)
        for number in sorted({threads, 1}):
            decode = pair.whole_decode(height, width, number)
            found.decode.setdefault(number, []).append(decode.parts)
        for unet_threads, vae_threads in thread_splits(threads):
            for num_chunks in BESIDE_CHUNKS:
                kind = SlotKind(
                    unet_threads=unet_threads, vae_threads=vae_threads, chunks=num_chunks
                )
                for count in (one for one in BESIDE_ROWS if one <= max(rows)):
                    step, chunk = pair.together(
                        Forward(height=height, width=width, rows=count, threads=unet_threads),
                        Chunks(
                            height=height, width=width, num_chunks=num_chunks, threads=vae_threads
                        ),
                    )
                    found.beside_step.setdefault((kind, count), []).append(step.seconds)
                    found.beside_chunks.setdefault((kind, count), []).append(chunk.seconds)
        found.encode.append(pair.encode_s("a red apple on a table"))
    return found


def quartile_spread(samples: Sequence[float]) -> float:
    """(75th - 25th percentile) / median; 0 for fewer than two samples."""
    if len(samples) < 2:  # noqa: PLR2004
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / statistics.median(samples)


def make_profile(
    found: Measurements,
    *,
    model_id: str,
    device: str,
    dtype: str,
    threads: int,
    size: tuple[int, int],
    notes: Mapping[str, str],
) -> Profile:
    """Medians and spreads as the scheduler's profile."""
    key = make_key(*size)
    slots = []
    for number in sorted({number for number, _ in found.alone}):
        samples = {rows: v for (kind, rows), v in found.alone.items() if kind == number}
        slots.append(
            SlotTiming(
                key=key,
                kind=SlotKind(unet_threads=number),
                step_ms=_medians_ms(samples),
                spread=max(map(quartile_spread, samples.values())),
            )
        )
    for kind in sorted({kind for kind, _ in found.beside_step}):
        steps = {rows: v for (one, rows), v in found.beside_step.items() if one == kind}
        chunks = {rows: v for (one, rows), v in found.beside_chunks.items() if one == kind}
        slots.append(
            SlotTiming(
                key=key,
                kind=kind,
                step_ms=_medians_ms(steps),
                chunks_ms=_medians_ms(chunks),
                spread=max(map(quartile_spread, [*steps.values(), *chunks.values()])),
            )
        )
    decodes = []
    for number, samples_of_decodes in found.decode.items():
        by_chunk = list(zip(*samples_of_decodes, strict=True))
        decodes.append(
            DecodeTiming(
                key=key,
                threads=number,
                chunk_ms=tuple(round(statistics.median(one) * 1e3, 3) for one in by_chunk),
                granularity=f"{len(by_chunk)} chunks along the layers",
                spread=quartile_spread([sum(parts) for parts in samples_of_decodes]),
            )
        )
    return Profile(
        model_id=model_id,
        device=device,
        dtype=dtype,
        threads=threads,
        slots=tuple(slots),
        decodes=tuple(decodes),
        encode_ms=round(statistics.median(found.encode) * 1e3, 3),
        notes=notes,
    )


def _medians_ms(samples: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {rows: round(statistics.median(one) * 1e3, 3) for rows, one in samples.items()}


def profile(  # noqa: PLR0917 - options of a command
    model: Annotated[Path, typer.Option(help="A diffusers folder.")] = EMBEDDED_MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write.")] = Path(
        "profile.json"
    ),
    plot: Annotated[Path | None, typer.Option(help="A PNG of what was found.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    chunks: Annotated[int, typer.Option(min=1, help="Chunks a decode is cut into.")] = 4,
    repeats: Annotated[int, typer.Option(min=2)] = 9,
    size: Annotated[str, typer.Option(help="WxH in pixels; the model's default if empty.")] = "",
) -> None:
    """Measure slots, decodes and both side by side, and write them as one JSON file."""
    threads = available_threads()
    sample = json.loads((model / "unet" / "config.json").read_text())["sample_size"]
    vae = json.loads((model / "vae" / "config.json").read_text())
    side = sample * 2 ** (len(vae["block_out_channels"]) - 1)
    width, height = map(int, size.split("x")) if size else (side, side)
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)  # type: ignore[arg-type]
    dtype_name = str(torch_dtype).removeprefix("torch.")
    with running_pair(model, device=device, dtype=dtype_name, num_chunks=chunks) as pair:  # type: ignore[arg-type]
        found = measure(
            pair, size=(height, width), threads=threads, num_repeats=repeats, say=typer.echo
        )
    notes = {name: str(value) for name, value in machine().items()}
    result = make_profile(
        found,
        model_id=model.resolve().name,
        device=torch_device.type,
        dtype=dtype_name,
        threads=threads,
        size=(height, width),
        notes=notes | {"at": time.strftime("%Y-%m-%d")},
    )
    out.write_text(format_profile(result))
    key = make_key(height, width)
    typer.echo(f"{out}: knee at {result.knee(key)} rows")
    if plot:
        from bench.profile_plot import plot_profile  # noqa: PLC0415 - matplotlib is optional

        plot_profile(result, key, plot)
        typer.echo(str(plot))
