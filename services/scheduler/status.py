"""What the scheduler shows of its core: gauges, and the map that the gateways read."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

from services.scheduler.core import Core
from shared import metrics
from shared.host import Transport, choose_transport

UNET_STAGES = ("waiting", "encoding", "denoising")
VAE_STAGES = ("latents", "decoding")


def describe(core: Core, *, policy: str, now: float) -> dict[str, Any]:
    """The value of `keys.STATUS`."""
    return {
        "epoch": core.epoch,
        "policy": policy,
        "stages": dict(core.count_stages()),
        "queue": core.queue_order(now),
        "theta": {name: round(unet.threshold.value, 3) for name, unet in core.unets.items()},
        "profiles": {name: unet.profile.source for name, unet in core.unets.items()},
        "capacity": core.capacity(),
        "unet_workers": len(core.unets),
        "vae_workers": len(core.vaes),
    }


def show_gauges(core: Core) -> None:
    """Set the gauges of requests, workers and devices."""
    stages = core.count_stages()
    unets, vaes = core.unets.values(), core.vaes.values()
    for stage in ("recovering", *UNET_STAGES, *VAE_STAGES):
        metrics.REQUESTS.labels(state=stage).set(stages[stage])
    metrics.BACKLOG.labels(pool="unet").set(sum(stages[stage] for stage in UNET_STAGES))
    metrics.BACKLOG.labels(pool="vae").set(sum(stages[stage] for stage in VAE_STAGES))
    metrics.WORKERS.labels(kind="unet").set(len(unets))
    metrics.WORKERS.labels(kind="vae").set(len(vaes))
    pairs = Counter(choose_transport(unet.info, vae.info) for unet in unets for vae in vaes)
    for transport in get_args(Transport):
        metrics.PAIRS.labels(transport=transport).set(pairs[transport])
    for unet in unets:
        group = unet.info.device_group
        metrics.THRESHOLD.labels(device_group=group).set(unet.threshold.value)
        is_complete = any(timing.kind.chunks for timing in unet.profile.slots)
        metrics.PROFILE_COMPLETE.labels(device_group=group).set(is_complete)
