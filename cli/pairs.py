"""Which transport latents take between the workers of a running service, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError

from shared.errors import ConfigurationError
from shared.host import Transport, choose_transport, is_same_device
from shared.messages import WorkerInfo
from shared.store import keys
from shared.store.registrations import readable_workers

_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A UNet worker, a VAE worker of the same model, and what is between them."""

    unet: str
    vae: str
    transport: Transport
    reason: str


def read_workers(redis_url: str) -> list[WorkerInfo]:
    """Return the workers that are registered with a running service, as far as they can be read.

    Raises:
        ConfigurationError: There is no Redis to ask.
    """
    try:
        with Redis.from_url(
            redis_url, protocol=2, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
        ) as redis:
            incarnations = sorted(cast("Any", redis.smembers(keys.WORKERS)))
            names = [keys.worker(name.decode(errors="replace")) for name in incarnations]
            payloads = cast("Any", redis.mget(names)) if names else []
    except (RedisError, OSError) as error:
        place = redis_url.rpartition("@")[2]
        raise ConfigurationError(f"can't ask Redis at {place}: {error}") from error
    return readable_workers(payloads)


def pair_up(workers: Sequence[WorkerInfo]) -> tuple[Pair, ...]:
    """Return every pair that latents may have to travel between."""
    return tuple(
        Pair(
            unet=unet.worker_id,
            vae=vae.worker_id,
            transport=choose_transport(unet, vae),
            reason=_reason(unet, vae),
        )
        for unet in workers
        for vae in workers
        if (unet.kind, vae.kind) == ("unet", "vae") and unet.model_id == vae.model_id
    )


def _reason(unet: WorkerInfo, vae: WorkerInfo) -> str:
    """Return what decides, most fundamental first; in the order of `choose_transport`."""
    if not unet.pool:
        return "told to use nothing else"
    if unet.host.partition(".")[0] != vae.host.partition(".")[0]:
        return "on different hosts"
    if unet.host != vae.host:
        return "on one host with no /dev/shm in common (IPC namespace, user or setting)"
    if unet.device == vae.device:
        return "both on the CPU of one host" if unet.device == "cpu" else "both on one GPU"
    if "cpu" in {unet.device, vae.device}:
        return "one on a GPU, the other on the CPU"
    same_gpu = is_same_device(unet.device, vae.device)
    return "on one GPU, in different PID or IPC namespaces" if same_gpu else "on different GPUs"
