"""Who is there to make pictures: workers, scheduler and store, looked at about every second.

`Fleet` is one look, a plain value; `FleetWatch` keeps the latest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared import codec, keys
from shared.errors import ProtocolError
from shared.logs import get_logger
from shared.messages import ModelInfo, WorkerInfo

LOOK_INTERVAL_S = 1.0
STALE_AFTER_S = 4.0
"""A look older than this means that Redis does not answer."""
MODEL_MEMORY_S = 300.0
"""How long a model whose workers are gone still takes requests: they restart within that."""
MAX_MEMORY_FRACTION = 0.9
"""Of Redis's `maxmemory`; beyond it nothing is admitted, so that open work can still finish."""

log = get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenModel:
    """A model and when its workers were last there. first_seen_at: seconds since the epoch."""

    info: ModelInfo
    first_seen_at: float
    last_seen: float
    has_unet: bool
    has_vae: bool

    @property
    def is_ready(self) -> bool:
        """Whether it had both kinds of worker at the last look."""
        return self.has_unet and self.has_vae


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """One look. looked: on the monotonic clock, as `last_seen`. memory_fraction: of `maxmemory`.

    queue: ids of the waiting requests, the next one first; None while no scheduler is alive.
    """

    looked: float = float("-inf")
    models: Mapping[str, SeenModel] = field(default_factory=dict)
    queue: tuple[str, ...] | None = None
    memory_fraction: float = 0.0

    @property
    def is_store_full(self) -> bool:
        """Whether admission must stop to leave room for the work that is open."""
        return self.memory_fraction > MAX_MEMORY_FRACTION

    def reasons_not_ready(self, now: float) -> tuple[str, ...]:
        """Why pictures can't be made now; empty if they can. now: on the monotonic clock."""
        if now - self.looked > STALE_AFTER_S:
            return ("Redis does not answer",)
        reasons: list[str] = []
        if self.queue is None:
            reasons.append("no scheduler is alive")
        if self.is_store_full:
            reasons.append(f"Redis has used {self.memory_fraction:.0%} of its memory")
        if not any(model.is_ready for model in self.models.values()):
            reasons += _missing_workers(self.models) or ["no UNet worker has registered"]
        return tuple(reasons)

    def queue_position(self, request_id: str) -> int | None:
        """1 for the request that is admitted next; None if it does not wait or is not known."""
        queue = self.queue or ()
        return queue.index(request_id) + 1 if request_id in queue else None


def _missing_workers(models: Mapping[str, SeenModel]) -> list[str]:
    return [
        f"{kind} worker of {name} is missing"
        for name, model in sorted(models.items())
        for kind, is_there in (("the UNet", model.has_unet), ("the VAE", model.has_vae))
        if not is_there
    ]


def look(
    before: Fleet,
    *,
    workers: Sequence[WorkerInfo],
    status: Mapping[str, Any] | None,
    memory_fraction: float,
    now: float,
    wall_now: float,
) -> Fleet:
    """The fleet as it is now, remembering models whose workers were there not long ago."""
    models = {
        name: replace(model, has_unet=False, has_vae=False)
        for name, model in before.models.items()
        if now - model.last_seen < MODEL_MEMORY_S
    }
    vae_models = {worker.model_id for worker in workers if worker.kind == "vae"}
    for name in {worker.model_id for worker in workers}:
        known = models.get(name)
        infos = [worker.model for worker in workers if worker.model_id == name and worker.model]
        if infos:
            info = _common_model(infos)
        elif known:
            info = known.info
        else:
            continue
        models[name] = SeenModel(
            info=info,
            first_seen_at=known.first_seen_at if known else wall_now,
            last_seen=now,
            has_unet=bool(infos),
            has_vae=name in vae_models,
        )
    return Fleet(
        looked=now,
        models=models,
        queue=None if status is None else tuple(status.get("queue", ())),
        memory_fraction=memory_fraction,
    )


def _common_model(infos: Sequence[ModelInfo]) -> ModelInfo:
    """What every UNet worker of a model can do."""
    return replace(infos[0], max_side=min(info.max_side for info in infos))


class FleetWatch:
    """Keeps `fleet` up to date while `run` runs.

    redis: the connection; the caller owns it.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.fleet = Fleet()

    async def run(self) -> None:
        """Look about every second, for ever; Redis may come and go."""
        while True:
            try:
                await self.refresh()
            except (RedisError, OSError) as error:
                log.warning("can't read the registrations", error=str(error))
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def refresh(self) -> None:
        """Look once.

        Raises:
            RedisError: Redis does not answer.
        """
        incarnations = await cast("Any", self._redis.smembers(keys.WORKERS))
        async with self._redis.pipeline(transaction=False) as pipeline:
            for incarnation in sorted(incarnations):
                pipeline.get(keys.worker(incarnation.decode()))
            pipeline.get(keys.STATUS)
            pipeline.info("memory")
            *payloads, status, memory = await pipeline.execute()
        maxmemory = memory.get("maxmemory", 0)
        self.fleet = look(
            self.fleet,
            workers=[worker for payload in payloads if (worker := _read_worker(payload))],
            status=codec.decode_value(status, dict) if status else None,
            memory_fraction=memory["used_memory"] / maxmemory if maxmemory else 0.0,
            now=time.monotonic(),
            wall_now=time.time(),
        )


def _read_worker(payload: bytes | None) -> WorkerInfo | None:
    """A registration; None if it has lapsed, or is of a version that this one can't read."""
    if payload is None:
        return None
    try:
        return codec.decode_value(payload, WorkerInfo)
    except ProtocolError as error:
        log.warning("unreadable registration", error=str(error))
        return None
