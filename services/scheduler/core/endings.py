"""How a request ends, or begins again: failures, restarts, cancellations, lost workers.

Whatever workers still hold of it is freed in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.core.cluster import Cluster
from services.scheduler.core.commands import RestartRequest
from services.scheduler.core.outbox import Outbox
from services.scheduler.core.state import AT_UNET, Request
from shared import messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Endings:
    """The ways back, over a cluster."""

    cluster: Cluster
    outbox: Outbox
    max_attempts: int
    """A request that needs more fails; so does one whose decode has begun more often."""

    def restart(self, request: Request, reason: str) -> None:
        """Give the request up where it is and let it wait for a new attempt, or fail it."""
        self._leave_workers(request)
        if request.num_attempts >= self.max_attempts:
            self.cluster.remove(request)
            self.outbox.fail(
                request.request_id,
                code="too_many_attempts",
                reason=f"given up after {request.num_attempts} attempts; the last: {reason}",
            )
            return
        self.outbox.add(RestartRequest(request_id=request.request_id, reason=reason))
        self.cluster.start_over(request)

    def fail(self, request: Request, *, code: str, reason: str) -> None:
        """End the request as failed."""
        self.drop(request)
        self.outbox.fail(request.request_id, code=code, reason=reason)

    def drop(self, request: Request, *, committed_by: str = "") -> None:
        """Free what is held of a request that is final already.

        committed_by: the VAE worker whose commit made it so, which has nothing more to free.
        """
        self._leave_workers(request, committed_by=committed_by)
        self.cluster.remove(request)

    def lose_worker(self, incarnation: str) -> None:
        """Begin a lost worker's denoising again elsewhere, and give its decodes to others."""
        is_vae = incarnation in self.cluster.vaes
        decodes = list(self.cluster.vaes[incarnation].decodes) if is_vae else []
        self.cluster.remove_worker(incarnation)
        for request in self.cluster.held_by(incarnation):
            self.restart(request, "unet worker lost")
        for request_id in decodes:
            self.decode_elsewhere(self.cluster.requests[request_id], "vae worker lost")

    def decode_elsewhere(self, request: Request, reason: str) -> None:
        """Give a decode up where it is; it begins again, or fails if it has begun too often."""
        if request.num_decodes >= self.max_attempts:
            self.fail(
                request,
                code="too_many_attempts",
                reason=f"given up after {request.num_decodes} decodes; the last: {reason}",
            )
            return
        self._cancel_decode(request)
        self.cluster.wait_for_vae(request)

    def _cancel_decode(self, request: Request) -> None:
        if self.cluster.leave_vae(request):
            cancel = messages.CancelDecode(
                epoch=self.cluster.epoch, request_id=request.request_id, attempt=request.attempt
            )
            self.outbox.send(request.vae, "control", cancel)

    def _leave_workers(self, request: Request, *, committed_by: str = "") -> None:
        if request.unet in self.cluster.unets and request.stage in AT_UNET:
            self.outbox.release(request.unet, request.request_id, request.attempt)
        if committed_by and committed_by == request.vae:
            self.cluster.leave_vae(request)
        self._cancel_decode(request)
        if request.latents and not committed_by:
            self.outbox.release_latents(request.latents)
