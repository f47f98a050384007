"""Whether a service is ready, for a container's health check: `python -m shared.healthcheck KIND`.

KIND is gateway, scheduler, unet_worker or vae_worker. Exit code 0 if pictures can count on it.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import urllib.error
import urllib.request
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared import codec, keys
from shared.errors import SynerDiffError
from shared.messages import WorkerInfo
from shared.settings import GatewaySettings, ServiceSettings, WorkerSettings, load_settings
from shared.worker_id import make_worker_id

TIMEOUT_S = 3.0


def _gateway_is_ready() -> bool:
    """Its own word, which holds for the whole stack."""
    port = load_settings(GatewaySettings).port
    try:
        url = f"http://127.0.0.1:{port}/readyz"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply:
            return bool(reply.status == 200)  # noqa: PLR2004
    except (urllib.error.URLError, TimeoutError):
        return False


async def _scheduler_is_ready(redis: Redis) -> bool:
    """It renews its figures every half second."""
    return bool(await redis.exists(keys.STATUS))


async def _worker_is_ready(redis: Redis, kind: str) -> bool:
    """A worker of this container's name is registered."""
    name = make_worker_id(load_settings(WorkerSettings).worker_id, kind)
    incarnations = await cast("Any", redis.smembers(keys.WORKERS))
    payloads = [await redis.get(keys.worker(one.decode())) for one in incarnations]
    infos = [codec.decode_value(cast("bytes", one), WorkerInfo) for one in payloads if one]
    return any(info.worker_id == name for info in infos)


async def _is_ready(service: str) -> bool:
    settings = load_settings(ServiceSettings)
    async with Redis.from_url(settings.redis_url, protocol=2, socket_timeout=TIMEOUT_S) as redis:
        if service == "scheduler":
            return await _scheduler_is_ready(redis)
        return await _worker_is_ready(redis, service.removesuffix("_worker"))


def main() -> int:
    """The exit code."""
    service = sys.argv[1] if len(sys.argv) > 1 else ""
    if service not in {"gateway", "scheduler", "unet_worker", "vae_worker"}:
        sys.exit(f"{socket.gethostname()}: no such service: {service!r}")
    try:
        is_ready = _gateway_is_ready() if service == "gateway" else asyncio.run(_is_ready(service))
    except (RedisError, SynerDiffError, OSError) as error:
        sys.exit(f"not ready: {error}")
    return 0 if is_ready else 1


if __name__ == "__main__":
    sys.exit(main())
