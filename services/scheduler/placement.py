"""Where requests go: which UNet worker admits one, which VAE worker decodes one.

Both by predicted finish time: the work ahead at the rate of the worker's profile, then its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf

from services.scheduler.packing import MIN_ROWS
from services.scheduler.state import AT_UNET, Request, UnetWorker, VaeWorker
from shared.host import Transport, choose_transport
from shared.messages import LatentsFinished

DECODES_PER_WORKER = 2
"""At a VAE worker at once: one decodes, the next has arrived already."""


@dataclass(slots=True, kw_only=True)
class Load:
    """What a UNet worker holds."""

    num_requests: int = 0
    knees: float = 0.0
    """Full slots that a step of all of them takes: each request's rows over its own size's knee."""
    work_ms: float = 0.0
    """The worker's own time for all their steps, at the knee's rate."""

    def add(self, request: Request, unet: UnetWorker) -> None:
        """Count one more request."""
        self.num_requests += 1
        self.knees += request.rows / knee(request, unet)
        self.work_ms += work_ms(request, unet)


def loads(requests: Iterable[Request], unets: Mapping[str, UnetWorker]) -> dict[str, Load]:
    """What each UNet worker holds."""
    found = {name: Load() for name in unets}
    for request in requests:
        if request.unet in found and request.stage in AT_UNET:
            found[request.unet].add(request, unets[request.unet])
    return found


def knee(request: Request, unet: UnetWorker) -> int:
    """The rows of a full slot of the request's size."""
    return max(MIN_ROWS, unet.profile.knee(request.batch_key.size))


def has_room(unet: UnetWorker, load: Load, factor: int) -> bool:
    """Whether the worker may be given a request, of whatever size.

    It does not depend on the request, so that who is first in order is never passed by those who
    need less room.

    factor: what a worker holds may reach so many full slots.
    """
    return unet.is_usable and load.num_requests < unet.info.max_requests and load.knees < factor


def work_ms(request: Request, unet: UnetWorker) -> float:
    """The time of the device that a request's steps still take, in full slots."""
    size = request.batch_key.size
    knee = unet.profile.knee(size)
    slot_ms, _ = unet.profile.slot_ms(size, knee, unet.profile.alone_kind(size))
    return request.expected_forwards * request.rows * slot_ms / knee


def service_ms(request: Request, unet: UnetWorker) -> float:
    """The least time from admission to the decoded image, with nobody else there."""
    profile, size = unet.profile, request.batch_key.size
    step_ms, _ = profile.slot_ms(size, request.rows, profile.alone_kind(size))
    decode = profile.decode(size)
    return (
        profile.encode_ms
        + request.expected_forwards * step_ms
        + (sum(decode.chunk_ms) if decode else 0.0)
    )


def choose_unet(
    request: Request, unets: Mapping[str, UnetWorker], held: Mapping[str, Load], *, factor: int
) -> str | None:
    """The worker with room at which a request is predicted to finish first; None where no room.

    factor: as `has_room` takes it.
    """
    best, best_ms = None, inf
    own_ms: dict[int, float] = {}
    for name, unet in sorted(unets.items()):
        load = held[name]
        if unet.info.model_id != request.batch_key.model or not has_room(unet, load, factor):
            continue
        # Workers alike share one profile.
        if id(unet.profile) not in own_ms:
            own_ms[id(unet.profile)] = service_ms(request, unet)
        finish_ms = load.work_ms + own_ms[id(unet.profile)]
        if finish_ms < best_ms:
            best, best_ms = name, finish_ms
    return best


def transport_of(
    latents: LatentsFinished, vae: VaeWorker, unets: Mapping[str, UnetWorker]
) -> Transport:
    """How latents get to a VAE worker; by their copy in Redis where their producer is gone."""
    producer = unets.get(latents.handle.owner)
    if producer is None or latents.handle.kind == "inline":
        return "inline"
    return choose_transport(producer.info, vae.info)


def choose_vae(
    request: Request,
    vaes: Mapping[str, VaeWorker],
    unets: Mapping[str, UnetWorker],
    busy_groups: frozenset[str],
) -> str | None:
    """The VAE worker with room that is predicted to be done first; None where no room.

    One on a device that denoises gives its decodes only a share of it, so it counts as slower. One
    that can't get at the latents is left out, unless there are only such: it will say that they
    are lost.
    """
    latents = request.latents
    assert latents is not None
    fitting = {
        name: vae
        for name, vae in vaes.items()
        if vae.is_usable and vae.info.model_id == request.batch_key.model
    }
    if not latents.handle.inline_key:
        near = {n: v for n, v in fitting.items() if transport_of(latents, v, unets) != "inline"}
        fitting = near or fitting
    room = [
        (
            (len(vae.decodes) + 1)
            * max(vae.info.decode_ms, 1e-3)
            * (4.0 if vae.info.device_group in busy_groups else 1.0),
            name,
        )
        for name, vae in fitting.items()
        if len(vae.decodes) < DECODES_PER_WORKER
    ]
    return min(room)[1] if room else None


def soonest_finish_ms(request: Request, unets: Iterable[UnetWorker]) -> float:
    """The least service time at any worker of the request's model; 0 where none is known."""
    fitting = [u for u in unets if u.info.model_id == request.batch_key.model]
    return min((service_ms(request, unet) for unet in fitting), default=0.0)
