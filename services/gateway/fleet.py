"""Who is there to make pictures: workers, scheduler and store, at one look. Plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.gateway.admission import Capacities, read_capacities
from shared import codec
from shared.errors import ProtocolError
from shared.logs import get_logger
from shared.messages import ModelInfo, WorkerInfo

STALE_AFTER_S = 4.0
"""A look older than this means that Redis does not answer."""
MODEL_MEMORY_S = 300.0
"""How long a model whose workers are gone is still known by name."""
RESTART_GRACE_S = 20.0
"""How long requests are taken for workers or a scheduler that are gone: a restart takes less."""
MAX_MEMORY_FRACTION = 0.9
"""Of Redis's `maxmemory`; beyond it nothing is admitted, so that open work can still finish."""

log = get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenModel:
    """A model and when its workers were there. Instants are on the monotonic clock but for one."""

    info: ModelInfo
    first_seen_at: float
    """Seconds since the epoch."""
    last_seen: float
    """When it last had a worker of any kind."""
    has_unet: bool
    has_vae: bool
    last_ready: float = float("-inf")
    """When it last had both kinds."""

    @property
    def is_ready(self) -> bool:
        """Whether it had both kinds of worker at the last look."""
        return self.has_unet and self.has_vae

    def missing_workers(self) -> list[str]:
        """Return a phrase for each kind of worker that it lacks."""
        kinds = (("UNet", self.has_unet), ("VAE", self.has_vae))
        return [
            f"the {kind} worker of {self.info.model_id} is missing"
            for kind, is_there in kinds
            if not is_there
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the scheduler last wrote, as far as it can be read."""

    queue: tuple[str, ...] = ()
    capacities: Capacities = field(default_factory=Capacities)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreState:
    """How Redis is doing."""

    memory_fraction: float = 0.0
    """Of `maxmemory`."""
    write_error: str = ""
    """Its words where it refuses to write, as with a full disk."""
    is_out_of_memory: bool = False
    """Whether that is why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """One look. Instants are on the monotonic clock."""

    looked: float = float("-inf")
    models: Mapping[str, SeenModel] = field(default_factory=dict)
    queue: tuple[str, ...] | None = None
    """Ids of the waiting requests, the next one first; None while no scheduler is alive."""
    capacities: Capacities = field(default_factory=Capacities)
    """What the scheduler says of its models."""
    scheduler_seen: float = float("-inf")
    """When one was last alive."""
    store: StoreState = field(default_factory=StoreState)

    def is_silent(self, now: float) -> bool:
        """Whether Redis has not answered for a while."""
        return now - self.looked > STALE_AFTER_S

    @property
    def is_store_full(self) -> bool:
        """Whether admission must stop to leave room for the work that is open."""
        return self.store.is_out_of_memory or self.store.memory_fraction > MAX_MEMORY_FRACTION

    def store_problem(self, now: float) -> str:
        """Return why the store can take nothing; empty if it can."""
        if self.is_silent(now):
            return "Redis does not answer"
        if self.is_store_full:
            return f"Redis has used {self.store.memory_fraction:.0%} of its memory"
        if self.store.write_error:
            return f"Redis refuses to write: {self.store.write_error}"
        return ""

    def reasons_not_ready(self, now: float) -> tuple[str, ...]:
        """Return why pictures can't be made now; empty if they can."""
        problem = self.store_problem(now)
        if self.is_silent(now):
            return (problem,)
        reasons: list[str] = []
        if self.queue is None:
            reasons.append("no scheduler is alive")
        if problem:
            reasons.append(problem)
        if not any(model.is_ready for model in self.models.values()):
            models = (model for _, model in sorted(self.models.items()))
            missing = [phrase for model in models for phrase in model.missing_workers()]
            reasons += missing or ["no UNet worker has registered"]
        return tuple(reasons)

    def reasons_not_to_wait(self, model: SeenModel, now: float) -> tuple[str, ...]:
        """Return what a model's requests need and has been gone for longer than a restart takes."""
        reasons: list[str] = []
        if self.queue is None and now - self.scheduler_seen > RESTART_GRACE_S:
            reasons.append("no scheduler is alive")
        if not model.is_ready and now - model.last_ready > RESTART_GRACE_S:
            reasons += model.missing_workers()
        return tuple(reasons)

    def queue_position(self, request_id: str) -> int | None:
        """1 for the request that is admitted next; None if it does not wait or is not known."""
        queue = self.queue or ()
        return queue.index(request_id) + 1 if request_id in queue else None


def look(
    before: Fleet,
    *,
    workers: Sequence[WorkerInfo],
    status: Status | None,
    store: StoreState,
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
        seen = SeenModel(
            info=info,
            first_seen_at=known.first_seen_at if known else wall_now,
            last_seen=now,
            has_unet=bool(infos),
            has_vae=name in vae_models,
            last_ready=known.last_ready if known else float("-inf"),
        )
        models[name] = replace(seen, last_ready=now) if seen.is_ready else seen
    return Fleet(
        looked=now,
        models=models,
        queue=status.queue if status else None,
        capacities=status.capacities if status else Capacities(),
        scheduler_seen=before.scheduler_seen if status is None else now,
        store=store,
    )


def _common_model(infos: Sequence[ModelInfo]) -> ModelInfo:
    """What every UNet worker of a model can do."""
    return replace(infos[0], max_side=min(info.max_side for info in infos))


def read_status(payload: bytes | None, written_at: float) -> Status | None:
    """Return what a scheduler wrote; None if there is nothing, or nothing that can be read."""
    if payload is None:
        return None
    try:
        fields = codec.decode_value(payload, dict)
    except ProtocolError as error:
        log.warning("unreadable status", error=str(error))
        return None
    queue = fields.get("queue")
    return Status(
        queue=tuple(map(str, queue)) if isinstance(queue, list | tuple) else (),
        capacities=Capacities(
            by_model=read_capacities(fields.get("capacity")), written_at=written_at
        ),
    )
