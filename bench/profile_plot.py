"""A profile as one picture: throughput, side by side against one after the other, chosen kinds."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from services.scheduler.devices.profile import Profile


def plot_profile(profile: Profile, key: str, path: Path) -> None:
    """Draw the profile's timings of one picture size to a PNG."""
    mpl.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for timing in profile.slots:
        if timing.key == key and not timing.kind.chunks:
            rows = sorted(timing.step_ms)
            rates = [count / timing.step_ms[count] * 1000 for count in rows]
            left.plot(rows, rates, marker="o", label=f"{timing.kind.unet_threads} threads")
    left.axvline(profile.knee(key), color="grey", linestyle=":", label="knee")
    left.set(xlabel="rows in a slot", ylabel="rows per second", title=f"{profile.model_id}, {key}")
    left.set_ylim(bottom=0)
    left.legend()

    decode = profile.decode(key)
    alone = profile.alone_kind(key)
    chunk_ms = sum(decode.chunk_ms) / len(decode.chunk_ms) if decode else 0.0
    for timing in profile.slots:
        if timing.key != key or not timing.kind.chunks:
            continue
        rows = sorted(timing.step_ms)
        ratios = []
        for count in rows:
            serial = profile.slot_ms(key, count, alone)[0] + timing.kind.chunks * chunk_ms
            ratios.append(max(timing.step_ms[count], timing.chunks_ms[count]) / serial)
        kind = timing.kind
        label = f"{kind.unet_threads}+{kind.vae_threads} threads, {kind.chunks} chunks"
        right.plot(rows, ratios, marker="o", label=label)
    right.axhline(1.0, color="grey", linestyle=":")
    right.set(
        xlabel="rows in a slot",
        ylabel="side by side / one after the other",
        title="a slot and its chunks (below 1: side by side is chosen)",
    )
    right.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
