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
from bench.skip_levels import measure_skip_levels
from launch.stack import EMBEDDED_MODEL
from services.scheduler.devices.measurements import (
    ALONE_ROWS,
    BESIDE_CHUNKS,
    BESIDE_ROWS,
    thread_splits,
)
from services.scheduler.devices.profile import (
    ASSUMED_SKIP_LEVELS,
    DecodeTiming,
    Profile,
    SkipLevel,
    SlotKind,
    SlotTiming,
    make_key,
)
from services.scheduler.devices.profile_file import format_profile
from shared.device import choose_device, choose_dtype
from shared.profile_files import ChunkGranularity
from shared.settings import available_threads

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
SHORT_REPEATS = 3

STRIP_FRACTIONS = (0.0, 0.25, 0.1)
"""On offer, the coarsest first: along the layers only, then in ever smaller row strips."""

MAX_OVERHEAD = 1.03
"""A coarser cut is kept where it takes at most so many times as long as the fastest."""

Samples = dict[Any, list[float]]


@dataclass(slots=True, kw_only=True)
class Measurements:
    """Raw samples in seconds, by what was measured."""

    alone: Samples = field(default_factory=dict)
    beside_step: Samples = field(default_factory=dict)
    beside_chunks: Samples = field(default_factory=dict)
    decode: dict[int, list[tuple[float, ...]]] = field(default_factory=dict)
    encode: list[float] = field(default_factory=list)


def choose_strip_fraction(
    decodes: Mapping[float, Sequence[Sequence[float]]], *, longest_chunk: float
) -> float:
    """The coarsest cut whose longest chunk is short enough, of those that take least.

    decodes: by strip fraction, the coarsest first; of each repeat the durations of its chunks.
    longest_chunk: as a share of the fastest decode. Where no cut keeps it, the one with the
    shortest longest chunk.
    """
    totals = {one: statistics.median(map(sum, repeats)) for one, repeats in decodes.items()}
    longest = {one: statistics.median(map(max, repeats)) for one, repeats in decodes.items()}
    allowed_s = longest_chunk * min(totals.values())
    fitting = [one for one in decodes if longest[one] <= allowed_s]
    if not fitting:
        return min(decodes, key=lambda one: longest[one])
    least_s = min(totals[one] for one in fitting)
    return next(one for one in fitting if totals[one] <= MAX_OVERHEAD * least_s)


def measure_cuts(
    pair: Pair, *, size: tuple[int, int], threads: int, num_repeats: int
) -> dict[float, list[tuple[float, ...]]]:
    """Decodes alone, cut in every way on offer, in turns."""
    found: dict[float, list[tuple[float, ...]]] = {one: [] for one in STRIP_FRACTIONS}
    for repeat in range(-1, num_repeats):  # the first warms up and is dropped
        for fraction, repeats in found.items():
            decode = pair.whole_decode(*size, threads, max_strip_fraction=fraction)
            if repeat >= 0:
                repeats.append(decode.parts)
    return found


def measure(
    pair: Pair,
    *,
    size: tuple[int, int],
    threads: int,
    num_repeats: int,
    max_strip_fraction: float = 0.0,
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
            decode = pair.whole_decode(height, width, number, max_strip_fraction=max_strip_fraction)
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
                            height=height,
                            width=width,
                            num_chunks=num_chunks,
                            threads=vae_threads,
                            max_strip_fraction=max_strip_fraction,
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


def slot_timings(found: Measurements, key: str) -> list[SlotTiming]:
    """Medians and spreads of slots alone and beside chunks."""
    slots = []
    for number in sorted({number for number, _ in found.alone}):
        samples = {rows: v for (kind, rows), v in found.alone.items() if kind == number}
        slots.append(
            SlotTiming(
                key=key,
                kind=SlotKind(unet_threads=number),
                step_ms=_medians_ms(samples),
                spread=_largest_spread(samples),
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
                spread=max(_largest_spread(steps), _largest_spread(chunks)),
            )
        )
    return slots


def decode_timings(found: Measurements, key: str, max_strip_fraction: float) -> list[DecodeTiming]:
    """Medians of every chunk, by threads."""
    cut = f"in strips of {max_strip_fraction}" if max_strip_fraction else "along the layers"
    decodes = []
    for number, samples in found.decode.items():
        chunk_ms = [statistics.median(one) * 1e3 for one in zip(*samples, strict=True)]
        longest = max(chunk_ms) / sum(chunk_ms)
        decodes.append(
            DecodeTiming(
                key=key,
                threads=number,
                chunk_ms=tuple(round(ms, 3) for ms in chunk_ms),
                granularity=f"{len(chunk_ms)} chunks {cut}, "
                f"the longest {longest:.2f} of the decode",
                spread=round(quartile_spread([sum(parts) for parts in samples]), 3),
            )
        )
    return decodes


def _largest_spread(samples: Mapping[int, Sequence[float]]) -> float:
    return round(max(map(quartile_spread, samples.values())), 3)


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
    longest_chunk: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a decode that no chunk should exceed.")
    ] = 0.4,
    repeats: Annotated[int, typer.Option(min=2)] = 25,
    size: Annotated[
        list[str] | None,
        typer.Option(help="WxH in pixels, as often as you like; by default the model's own."),
    ] = None,
    short: Annotated[bool, typer.Option(help="Less certain, under 30 s.")] = False,
) -> None:
    """Measure slots, decodes and both side by side, and write them as one JSON file."""
    threads = available_threads()
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)  # type: ignore[arg-type]
    dtype_name: Any = str(torch_dtype).removeprefix("torch.")
    slots: list[SlotTiming] = []
    decodes: list[DecodeTiming] = []
    encode_ms = []
    num_repeats = SHORT_REPEATS if short else repeats
    with running_pair(model, device=device, dtype=dtype_name, num_chunks=chunks) as pair:
        sizes = _sizes(model, size or [])
        cuts = measure_cuts(pair, size=max(sizes), threads=threads, num_repeats=num_repeats)
        fraction = choose_strip_fraction(cuts, longest_chunk=longest_chunk)
        for height, width in sizes:
            key = make_key(height, width)
            typer.echo(key)
            found = measure(
                pair,
                size=(height, width),
                threads=threads,
                num_repeats=num_repeats,
                max_strip_fraction=fraction,
                rows=ALONE_ROWS if short else ROWS,
                say=typer.echo,
            )
            slots += slot_timings(found, key)
            decodes += decode_timings(found, key, fraction)
            encode_ms.append(statistics.median(found.encode) * 1e3)
    result = Profile(
        model_id=model.resolve().name,
        device=torch_device.type,
        dtype=dtype_name,
        threads=threads,
        slots=tuple(slots),
        decodes=tuple(decodes),
        encode_ms=round(statistics.median(encode_ms), 3),
        granularity=ChunkGranularity(num_chunks=chunks, max_strip_fraction=fraction),
        skip_levels=_skip_levels(model, device, dtype_name, threads, is_short=short),
        notes=_notes(is_short=short),
    )
    out.write_text(format_profile(result))
    for key in dict.fromkeys(timing.key for timing in slots):
        typer.echo(f"{out}: {key}, knee at {result.knee(key)} rows")
    if plot:
        from bench.profile_plot import plot_profile  # noqa: PLC0415 - matplotlib is optional

        plot_profile(result, slots[0].key, plot)
        typer.echo(str(plot))


def _sizes(model: Path, asked: Sequence[str]) -> list[tuple[int, int]]:
    """(height, width) of what was asked for, or of the model's usual picture."""
    if asked:
        sizes = [tuple(map(int, one.split("x"))) for one in asked]
        return [(height, width) for width, height in sizes]
    sample = json.loads((model / "unet" / "config.json").read_text())["sample_size"]
    vae = json.loads((model / "vae" / "config.json").read_text())
    side = sample * 2 ** (len(vae["block_out_channels"]) - 1)
    return [(side, side)]


def _skip_levels(
    model: Path, device: str, dtype: Any, threads: int, *, is_short: bool
) -> Mapping[str, SkipLevel]:
    if is_short:
        return ASSUMED_SKIP_LEVELS
    typer.echo("skip levels")
    return measure_skip_levels(model, device=device, dtype=dtype, threads=threads)


def _notes(*, is_short: bool) -> dict[str, str]:
    notes = {name: str(value) for name, value in machine().items()}
    notes["at"] = time.strftime("%Y-%m-%d")
    if is_short:
        notes["skip_levels"] = "assumed: a short profile doesn't measure them"
    return notes
