"""Who goes to which worker: waiting requests to UNet workers, finished latents to VAE workers.

Places are chosen by `placement`; here they become messages.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import inf

from services.scheduler.core.blame import blamed_on
from services.scheduler.core.cluster import Cluster
from services.scheduler.core.commands import BeginAttempt
from services.scheduler.core.outbox import Outbox
from services.scheduler.core.placement import (
    choose_unet,
    choose_vae,
    has_room,
    loads,
    soonest_finish_ms,
    transport_of,
)
from services.scheduler.core.state import AT_UNET, Request, Stage, VaeWorker
from services.scheduler.planning.order import by_fair_share
from services.scheduler.planning.policy import Policy
from shared import messages
from shared.store import keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignments:
    """The first and the last of a request's ways, over a cluster."""

    cluster: Cluster
    policy: Policy
    """Says how much a UNet worker may hold."""
    outbox: Outbox

    def waiting(self, now: float, models: Collection[str] | None = None) -> list[Request]:
        """Return requests at no worker, the next to be admitted first; of these models only."""
        requests = self.cluster.requests.values()
        return by_fair_share(
            (
                request
                for request in requests
                if request.stage is Stage.WAITING
                and (models is None or request.batch_key.model in models)
            ),
            now,
            in_service=(request for request in requests if request.stage in AT_UNET),
        )

    def refuse_hopeless(self, request: Request, now: float) -> bool:
        """Fail a new request whose deadline nobody could keep, even with nobody else there."""
        if request.deadline_at == inf:
            return False
        soonest_at = now + soonest_finish_ms(request, self.cluster.unets.values()) / 1000
        if soonest_at <= request.deadline_at:
            return False
        reason = (
            f"deadline_ms is {request.request.deadline_ms}, but the picture takes at least "
            f"{(soonest_at - request.request.submitted_at) * 1000:.0f} ms"
        )
        self.outbox.fail(request.request_id, code="deadline_unmeetable", reason=reason)
        return True

    def admit_waiting(self, now: float) -> None:
        """Send requests to UNet workers as long as there is room."""
        cluster, factor = self.cluster, self.policy.admission_factor
        models = {
            request.batch_key.model
            for request in cluster.requests.values()
            if request.stage is Stage.WAITING
        }
        if not models:
            return
        held = loads(cluster.requests.values(), cluster.unets)
        models &= {
            unet.info.model_id
            for name, unet in cluster.unets.items()
            if has_room(unet, held[name], factor)
        }
        # Thousands may wait, so they are put in order only where there is room for one.
        for request in self.waiting(now, models) if models else ():
            if request.batch_key.model not in models:
                continue
            with blamed_on(request):
                name = choose_unet(request, cluster.unets, held, factor=factor)
                if name is not None:
                    self._admit(request, name, now)
                    held[name].add(request, cluster.unets[name])
                    continue
            models.remove(request.batch_key.model)
            if not models:
                return

    def assign_decodes(self, now: float) -> None:
        """Send finished latents to VAE workers that have room."""
        requests = self.cluster.requests.values()
        finished = [request for request in requests if request.stage is Stage.LATENTS]
        busy_groups = self.busy_groups()
        for request in by_fair_share(finished, now):
            with blamed_on(request):
                name = choose_vae(request, self.cluster.vaes, self.cluster.unets, busy_groups)
                if name is not None:
                    self._assign(request, self.cluster.vaes[name])

    def busy_groups(self) -> frozenset[str]:
        """Return devices on which a UNet worker is planned for, and with it the decodes there."""
        unets = self.cluster.unets.values()
        return frozenset(unet.info.device_group for unet in unets if not unet.is_suspect)

    def _admit(self, request: Request, unet: str, now: float) -> None:
        """Begin an attempt, or go on with the one that a drained worker has handed back."""
        if self.cluster.begin_admission(request, unet, now):
            self.outbox.add(BeginAttempt(request_id=request.request_id, attempt=request.attempt))
        admit = messages.AdmitRequest(
            epoch=self.cluster.epoch,
            request_id=request.request_id,
            attempt=request.attempt,
            parameters=request.request.parameters,
            resume_step=request.done_step,
        )
        self.outbox.send(unet, "control", admit)

    def _assign(self, request: Request, vae: VaeWorker) -> None:
        latents = request.latents
        assert latents is not None
        self.cluster.begin_decode(request, vae)
        decode = messages.DecodeLatents(
            epoch=self.cluster.epoch,
            request_id=request.request_id,
            attempt=request.attempt,
            handle=latents.handle,
            transport=transport_of(latents, vae, self.cluster.unets),
            parameters=request.request.parameters,
            skipped_steps=latents.skipped_steps,
            warnings=request.warnings,
            release_to=keys.control(latents.handle.owner),
        )
        self.outbox.send(request.vae, "work", decode)
