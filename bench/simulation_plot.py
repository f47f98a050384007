"""Plots of simulations: threshold, both stretches, pictures a second and decode latency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from services.scheduler.simulation.log import SimulationLog

BIN_S = 5.0


def plot_runs(path: Path, logs: Mapping[str, SimulationLog]) -> None:
    """One curve a run in each of five panels over simulated time."""
    figure, axes = plt.subplots(5, 1, sharex=True, figsize=(9, 12), layout="constrained")
    for name, log in logs.items():
        at = [sample.at_s for sample in log.thetas]
        axes[0].plot(at, [sample.theta for sample in log.thetas], label=name)
        axes[1].plot(at, [sample.unet_stretch for sample in log.thetas], linewidth=0.8)
        axes[2].plot(at, [sample.vae_stretch for sample in log.thetas], linewidth=0.8)
        done = [course for course in log.courses.values() if course.is_finished]
        last = max((course.finished_at for course in done), default=0.0)
        bins = [BIN_S * i for i in range(int(last / BIN_S) + 1)]
        counts = [sum(b <= c.finished_at < b + BIN_S for c in done) / BIN_S for b in bins]
        axes[3].plot(bins, counts)
        axes[4].plot(
            [course.finished_at for course in done],
            [course.finished_at - course.denoised_at for course in done],
            ".",
            markersize=3,
        )
    titles = ("threshold", "UNet stretch", "VAE stretch", "pictures a second", "decode latency, s")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_ylabel(title)
    axes[0].legend(loc="lower right", fontsize="small")
    axes[0].set_title("simulated")
    axes[-1].set_xlabel("simulated seconds")
    figure.savefig(path, dpi=110)
    plt.close(figure)
