"""How much work is ahead of a model's workers, and what more would add: by what serving takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from services.scheduler.packing import MIN_ROWS
from services.scheduler.profile import make_key
from services.scheduler.state import Request, Stage, UnetWorker, VaeWorker

HALF_LIFE_S = 10.0
"""Of what was learnt of the pace."""

PRIOR_S = 1.0
"""Seconds at the profile's pace that are taken as learnt at the start."""

MAX_LOOK_S = 5.0
"""Between two looks; a longer pause says nothing of the pace."""

MIN_EFFICIENCY, MAX_EFFICIENCY = 0.1, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Of one model, all as wall time of its workers together.

    A picture asked for now is predicted after backlog_ms + forwards * rows * row_ms + decode_ms +
    overhead_ms.
    """

    backlog_ms: float
    """Until everything accepted so far is done."""
    row_ms: float
    """That one more row's forward adds, at the default size and in full slots."""
    decode_ms: float
    """That one more decode of the default size adds."""
    overhead_ms: float
    """Of a request's other parts: encoding its prompt."""


@dataclass(slots=True, kw_only=True)
class Work:
    """Time of devices, as profiles predict it, by the kind of worker that needs it."""

    unet_ms: float = 0.0
    vae_ms: float = 0.0


@dataclass(slots=True, kw_only=True)
class Pace:
    """What a model's workers get done while they have all they can hold, over their profiles.

    The profiles' drift is left out: it moves with slots of few rows, too, which tell nothing of
    full ones, and whatever it says of these is in the pace.

    done: since the last look. was_full: whether there was more than could be held then.
    predicted_s, wall_s: what was done took so long by prediction and by the clock; the past fades.
    """

    done: Work = field(default_factory=Work)
    was_full: bool = False
    predicted_s: float = PRIOR_S
    wall_s: float = PRIOR_S

    @property
    def efficiency(self) -> float:
        """Predicted over real time: above 1 where overlap and skipping save some."""
        return min(max(self.predicted_s / self.wall_s, MIN_EFFICIENCY), MAX_EFFICIENCY)

    def learn(self, predicted_s: float, wall_s: float) -> None:
        """One more look."""
        fade = 0.5 ** (wall_s / HALF_LIFE_S)
        self.predicted_s = self.predicted_s * fade + predicted_s
        self.wall_s = self.wall_s * fade + wall_s


@dataclass(frozen=True, slots=True, kw_only=True)
class _Workers:
    """Of one model. num_unets, num_vaes: devices with such."""

    unets: tuple[UnetWorker, ...]
    vaes: tuple[VaeWorker, ...]
    devices: frozenset[str]
    num_unets: int
    num_vaes: int

    def row_ms(self, size: str) -> float:
        """A device's time for one row's forward in a full slot."""
        return fmean(
            unet.durations.alone(size, knee).ms / knee
            for unet in self.unets
            for knee in [max(MIN_ROWS, unet.profile.knee(size))]
        )

    def encode_ms(self) -> float:
        """A device's time for one prompt."""
        return fmean(unet.profile.encode_ms for unet in self.unets)

    def decode_ms(self, size: str) -> float:
        """A device's time for one decode."""
        decode = self.unets[0].profile.decode(size)
        if decode:
            return sum(decode.chunk_ms)
        return fmean(vae.info.decode_ms for vae in self.vaes)

    def wall_ms(self, work: Work) -> float:
        """How long they need for it together: whichever kind is short, or the devices are."""
        return max(
            work.unet_ms / self.num_unets,
            work.vae_ms / self.num_vaes,
            (work.unet_ms + work.vae_ms) / len(self.devices),
        )


class CapacityMeter:
    """It shares the core's state and changes none of it.

    Args:
        requests, unets, vaes: The core's own.
        now: The start.
    """

    def __init__(
        self,
        requests: Mapping[str, Request],
        unets: Mapping[str, UnetWorker],
        vaes: Mapping[str, VaeWorker],
        *,
        now: float,
    ) -> None:
        self._requests = requests
        self._unets = unets
        self._vaes = vaes
        self._paces: dict[str, Pace] = {}
        self._learned_at = now

    def note_prompt(self, request: Request) -> None:
        """A prompt was encoded."""
        if workers := self._workers(request.batch_key.model):
            self._pace(request).done.unet_ms += workers.encode_ms()

    def note_step(self, request: Request) -> None:
        """A request has had one more forward, skipped or not."""
        key = request.batch_key
        if workers := self._workers(key.model):
            self._pace(request).done.unet_ms += request.rows * workers.row_ms(key.size)

    def note_decode(self, request: Request) -> None:
        """An image is done."""
        key = request.batch_key
        if workers := self._workers(key.model):
            self._pace(request).done.vae_ms += workers.decode_ms(key.size)

    def learn(self, now: float) -> None:
        """Compare what was done with the time it took, where there was enough to do."""
        wall_s = now - self._learned_at
        self._learned_at = now
        full = {
            request.batch_key.model
            for request in self._requests.values()
            if request.stage in {Stage.WAITING, Stage.LATENTS}
        }
        for model in full:
            self._paces.setdefault(model, Pace())
        for model, pace in self._paces.items():
            workers = self._workers(model)
            is_full = model in full
            if workers and is_full and pace.was_full and 0 < wall_s <= MAX_LOOK_S:
                pace.learn(workers.wall_ms(pace.done) / 1000, wall_s)
            pace.done = Work()
            pace.was_full = is_full

    def read(self) -> dict[str, Capacity]:
        """By model, of those that have workers of both kinds."""
        models = {unet.info.model_id for unet in self._unets.values()}
        workers = {name: found for name in sorted(models) if (found := self._workers(name))}
        ahead = {name: self._ahead(name, found) for name, found in workers.items()}
        capacity = {}
        for name, own in workers.items():
            sharing = [other for other in workers if workers[other].devices & own.devices]
            efficiency = self._paces.get(name, Pace()).efficiency
            size = own.unets[0].profile.slots[0].key
            if model := own.unets[0].info.model:
                size = make_key(model.default_height, model.default_width)
            capacity[name] = Capacity(
                backlog_ms=sum(ahead[other] for other in sharing),
                row_ms=own.wall_ms(Work(unet_ms=own.row_ms(size))) / efficiency,
                decode_ms=own.wall_ms(Work(vae_ms=own.decode_ms(size))) / efficiency,
                overhead_ms=own.wall_ms(Work(unet_ms=own.encode_ms())) / efficiency,
            )
        return capacity

    def _ahead(self, model: str, workers: _Workers) -> float:
        """The wall time until a model's requests are done."""
        work = Work()
        row_ms: dict[str, float] = {}
        decode_ms: dict[str, float] = {}
        for request in self._requests.values():
            if request.batch_key.model != model:
                continue
            size = request.batch_key.size
            if size not in row_ms:
                row_ms[size] = workers.row_ms(size)
                decode_ms[size] = workers.decode_ms(size)
            if request.stage not in {Stage.LATENTS, Stage.DECODING}:
                work.unet_ms += request.expected_forwards * request.rows * row_ms[size]
                if request.stage is not Stage.DENOISING:
                    work.unet_ms += workers.encode_ms()
            vae = self._vaes.get(request.vae)
            num_chunks = vae.num_chunks(request.batch_key) if vae else 1
            left = max(1 - request.done_chunks / num_chunks, 0.0)
            work.vae_ms += left * decode_ms[size]
        return workers.wall_ms(work) / self._paces.get(model, Pace()).efficiency

    def _pace(self, request: Request) -> Pace:
        return self._paces.setdefault(request.batch_key.model, Pace())

    def _workers(self, model: str) -> _Workers | None:
        """None where pictures can't be made."""
        unets = tuple(
            one for one in self._unets.values() if one.info.model_id == model and one.is_usable
        )
        vaes = tuple(
            one for one in self._vaes.values() if one.info.model_id == model and one.is_usable
        )
        if not (unets and vaes):
            return None
        unet_devices = frozenset(one.info.device_group for one in unets)
        vae_devices = frozenset(one.info.device_group for one in vaes)
        return _Workers(
            unets=unets,
            vaes=vaes,
            devices=unet_devices | vae_devices,
            num_unets=len(unet_devices),
            num_vaes=len(vae_devices),
        )
