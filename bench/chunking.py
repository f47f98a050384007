"""`synerdiff bench chunking`: what a decode in chunks costs, changes and saves.

Three ways of one decode alternate: the library's whole one, chunks along the layers, and chunks
with row strips. On a CPU one thread computes, and its own CPU time is what counts, which neighbours
on the machine hardly enter; on a GPU it is the wall clock, synchronised at the end of every chunk.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.chunking_memory import MemoryCase, peak_extra_bytes, random_decoder
from bench.report import spread, write_report
from launch.stack import EMBEDDED_MODEL
from services.vae_worker.decoding import ChunkPlan, Granularity, decode_chunks, plan_chunks
from services.vae_worker.model import load_decoder
from shared.device import DtypeName, choose_device, choose_dtype

SD_WIDTHS = (128, 256, 512, 512)
QUARTER_WIDTHS = (32, 64, 128, 128)
LAYERS = Granularity(num_chunks=16)
STRIPS = Granularity(num_chunks=20, max_strip_fraction=0.07)
MANY_STRIPS = Granularity(max_strip_fraction=0.02)
ONE_ROW_STRIPS = Granularity(max_strip_fraction=1e-9)
MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A decoder and latents for it."""

    name: str
    vae: Any
    latents: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in."""
        dtype: torch.dtype = self.vae.decoder.conv_in.weight.dtype
        return dtype

    def plan(
        self, granularity: Granularity, *, unit_costs: Sequence[float] | None = None
    ) -> ChunkPlan:
        """A plan for these latents."""
        height, width = self.latents.shape[2:]
        return plan_chunks(self.vae, height, width, granularity=granularity, unit_costs=unit_costs)

    def whole(self) -> Tensor:
        """The library's decode."""
        with torch.inference_mode():
            scaled = self.latents / self.vae.config.scaling_factor
            image: Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return image


def _emoji(device: torch.device, dtype: torch.dtype, size: tuple[int, int], batch: int) -> Subject:
    names: dict[torch.dtype, DtypeName] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    vae = load_decoder(EMBEDDED_MODEL, device=str(device), dtype=names[dtype]).vae
    shape = (batch, vae.config.latent_channels, *size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    height, width = (side * 8 for side in size)
    return Subject(
        name=f"emoji, {height} x {width}, batch {batch}, {names[dtype]}",
        vae=vae,
        latents=latents.to(device, dtype),
    )


def _stable_diffusion(device: torch.device, dtype: torch.dtype, pixels: int, seed: int) -> Subject:
    vae = random_decoder(SD_WIDTHS, device=device, dtype=dtype, seed=seed)
    shape = (1, vae.config.latent_channels, pixels // 8, pixels // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Subject(
        name=f"Stable Diffusion's shape, {pixels} x {pixels}, {str(dtype).split('.')[1]}",
        vae=vae,
        latents=latents.to(device, dtype) * vae.config.scaling_factor,
    )


def _finish(subject: Subject, plan: ChunkPlan) -> Tensor:
    chunks = decode_chunks(subject.vae, subject.latents, plan=plan)
    while True:
        try:
            next(chunks)
        except StopIteration as end:
            image: Tensor = end.value
            return image


# --- time -----------------------------------------------------------------------------------------

Clock = Callable[[], float]


@contextmanager
def _clock(device: torch.device) -> Iterator[Clock]:
    """Seconds of compute so far, in the way that the module's docstring says."""

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    if device.type == "cuda":
        yield synchronised
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield time.thread_time
    finally:
        torch.set_num_threads(threads)


def _chunk_times(subject: Subject, plan: ChunkPlan, now: Clock) -> list[float]:
    chunks = decode_chunks(subject.vae, subject.latents, plan=plan)
    times = []
    for _ in range(plan.num_chunks):
        start = now()
        next(chunks, None)
        times.append(now() - start)
    return times


def _measured_plan(
    subject: Subject, granularity: Granularity, now: Clock, repeats: int
) -> ChunkPlan:
    """Chunks of about equal measured time, as the profiler makes them."""
    finest = subject.plan(replace(granularity, num_chunks=None))
    runs = [_chunk_times(subject, finest, now) for _ in range(repeats)]
    costs = [min(times) for times in zip(*runs, strict=True)]
    return subject.plan(granularity, unit_costs=costs)


def measure_time(subject: Subject, *, repeats: int) -> dict[str, Any]:
    """Overheads and longest chunks of the decode along layers and with strips."""
    with _clock(subject.latents.device) as now:
        subject.whole()
        plans = {
            name: _measured_plan(subject, granularity, now, max(1, min(repeats // 3, 10)))
            for name, granularity in (("layer", LAYERS), ("strip", STRIPS))
        }
        whole: list[float] = []
        chunked: dict[str, list[list[float]]] = {name: [] for name in plans}
        for repeat in range(repeats):
            for turn in range(3):
                if (repeat + turn) % 3 == 0:
                    start = now()
                    subject.whole()
                    whole.append(now() - start)
                else:
                    name = ("layer", "strip")[(repeat + turn) % 3 - 1]
                    chunked[name].append(_chunk_times(subject, plans[name], now))
    result: dict[str, Any] = {"decoder": subject.name, "whole_s": spread(whole)}
    for name, plan in plans.items():
        ratios = [sum(times) / alone for times, alone in zip(chunked[name], whole, strict=True)]
        longest = max(statistics.median(times) for times in zip(*chunked[name], strict=True))
        result[name] = {
            "granularity": asdict(LAYERS if name == "layer" else STRIPS),
            "num_chunks": plan.num_chunks,
            "num_units": len(plan.units),
            "overhead": spread(ratios),
            "longest_fraction": longest / statistics.median(whole),
        }
        print(
            f"{subject.name}, {name} chunks ({plan.num_chunks}): "
            f"{result[name]['overhead']['median']:.3f} of the whole decode's "
            f"{statistics.median(whole) * 1000:.0f} ms, the longest "
            f"{result[name]['longest_fraction']:.3f}"
        )
    return result


# --- exactness ------------------------------------------------------------------------------------


def measure_difference(subject: Subject, granularity: Granularity) -> dict[str, Any]:
    """max|a - b| / max|b| against the whole decode, in fp32."""
    whole = subject.whole()

    def relative(image: Tensor) -> float:
        return float((image - whole).abs().max() / whole.abs().max())

    layers = _finish(subject, subject.plan(LAYERS))
    result = {
        "decoder": subject.name,
        "layers_bit_equal": torch.equal(layers, whole),
        "layer_rel_diff": relative(layers),
        "strip_rel_diff": relative(_finish(subject, subject.plan(granularity))),
    }
    print(f"{subject.name}: layers equal: {result['layers_bit_equal']}, strips within", end=" ")
    print(f"{result['strip_rel_diff']:.1e}")
    return result


def measure_bf16_loss(exact: Subject, rounded: Subject, granularity: Granularity) -> dict[str, Any]:
    """How much further than the whole bf16 decode strips in bf16 are from the fp32 decode, in dB.

    The PSNR is over the reference's range.
    """
    reference = exact.whole().double()

    def psnr_db(image: Tensor) -> float:
        error = (image.double() - reference).square().mean()
        return float(10 * (reference.abs().max().square() / error).log10())

    whole_db = psnr_db(rounded.whole())
    strip_db = psnr_db(_finish(rounded, rounded.plan(granularity)))
    print(f"{rounded.name}: {whole_db:.2f} dB whole, {strip_db:.2f} dB in strips")
    return {"decoder": rounded.name, "whole_psnr_db": whole_db, "strip_psnr_db": strip_db}


# --- memory ---------------------------------------------------------------------------------------


def measure_memory(case: MemoryCase) -> dict[str, Any]:
    """Peak extra memory of the whole decode and of strips."""
    whole_bytes, strip_bytes = peak_extra_bytes(replace(case, granularity=None), case)
    result: dict[str, Any] = {
        "decoder": f"Stable Diffusion's shape, widths {case.block_out_channels}, "
        f"{case.pixels} x {case.pixels}, {str(case.dtype).split('.')[1]}",
        "whole_bytes": whole_bytes,
        "strip_bytes": strip_bytes,
        "strip_ratio": strip_bytes / whole_bytes,
    }
    print(
        f"{result['decoder']}: whole {whole_bytes / MEBIBYTE:.0f} MiB, "
        f"strips {strip_bytes / MEBIBYTE:.0f} MiB"
    )
    return result


# --- the command ----------------------------------------------------------------------------------


def run(
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Less certain, under 50 s.")] = False,
) -> dict[str, float]:
    """What a decode in chunks costs, changes and saves, against the library's whole decode.

    Returns the worst over the decoders measured: `layer_overhead` and `strip_overhead` (summed
    chunk time over the whole decode's), `layer_longest_fraction` and `strip_longest_fraction` (the
    longest chunk over the whole decode), `strip_peak_memory_ratio` (extra memory over the whole
    decode's), `max_rel_diff` (max|a - b| / max|b| in fp32), `bf16_psnr_loss_db` (how much further
    from the fp32 decode strips in bf16 are than the whole bf16 decode).
    """
    device = choose_device("auto")
    native = choose_dtype("auto", device)
    exact, rounded = torch.float32, torch.bfloat16
    timed_pixels, exact_pixels = (64, 64) if quick else (512, 256)

    times = [
        measure_time(_emoji(device, native, (16, 16), 1), repeats=31 if quick else 61),
        measure_time(
            _stable_diffusion(device, native, timed_pixels, seed), repeats=5 if quick else 3
        ),
    ]
    emulated = []
    if native is torch.float32 and not quick:  # no bf16 hardware: for the record
        emulated.append(measure_time(_stable_diffusion(device, rounded, 64, seed), repeats=5))
    differences = [
        measure_difference(_emoji(device, exact, (16, 16), 1), MANY_STRIPS),
        measure_difference(_emoji(device, exact, (13, 9), 3), ONE_ROW_STRIPS),
        measure_difference(_stable_diffusion(device, exact, exact_pixels, seed), MANY_STRIPS),
    ]
    bf16_pixels = exact_pixels if native is not exact else 48 if quick else 64
    losses = [
        measure_bf16_loss(
            _emoji(device, exact, (16, 16), 1), _emoji(device, rounded, (16, 16), 1), MANY_STRIPS
        ),
        measure_bf16_loss(
            _stable_diffusion(device, exact, bf16_pixels, seed),
            _stable_diffusion(device, rounded, bf16_pixels, seed),
            MANY_STRIPS,
        ),
    ]
    memory = measure_memory(
        MemoryCase(
            block_out_channels=QUARTER_WIDTHS if quick else SD_WIDTHS,
            pixels=512 if quick else 1024,
            device=device,
            dtype=native,
            seed=seed,
            # as many strips per map, whatever its size
            granularity=replace(STRIPS, max_strip_bytes=(2 if quick else 32) * MEBIBYTE),
        )
    )
    write_report(
        "chunking",
        {
            "quick": quick,
            "device": str(device),
            "native_dtype": str(native),
            "clock": "wall clock" if device.type == "cuda" else "CPU time of one thread",
            "time": times,
            "time_of_emulated_bf16": emulated,
            "difference_fp32": differences,
            "loss_bf16": losses,
            "memory": memory,
        },
    )
    return {
        "layer_overhead": max(each["layer"]["overhead"]["median"] for each in times),
        "strip_overhead": max(each["strip"]["overhead"]["median"] for each in times),
        "layer_longest_fraction": max(each["layer"]["longest_fraction"] for each in times),
        "strip_longest_fraction": max(each["strip"]["longest_fraction"] for each in times),
        "strip_peak_memory_ratio": memory["strip_ratio"],
        "max_rel_diff": max(
            max(each["layer_rel_diff"], each["strip_rel_diff"]) for each in differences
        ),
        "bf16_psnr_loss_db": max(each["whole_psnr_db"] - each["strip_psnr_db"] for each in losses),
    }
