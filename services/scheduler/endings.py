"""How a request ends, or begins again: failures, restarts, cancellations, lost workers.

Whatever workers still hold of it is freed in any case.
"""

from __future__ import annotations

from services.scheduler.commands import RestartRequest
from services.scheduler.outbox import Outbox
from services.scheduler.state import AT_UNET, Request, Stage, UnetWorker, VaeWorker
from shared import messages


class Endings:
    """The backward half of the core; it shares the core's state.

    Args:
        requests, unets, vaes: The core's own.
        outbox: Where the messages go.
        max_attempts: A request that needs more fails.
    """

    def __init__(
        self,
        requests: dict[str, Request],
        unets: dict[str, UnetWorker],
        vaes: dict[str, VaeWorker],
        *,
        outbox: Outbox,
        max_attempts: int,
    ) -> None:
        self._requests = requests
        self._unets = unets
        self._vaes = vaes
        self._outbox = outbox
        self._max_attempts = max_attempts

    def restart(self, request: Request, reason: str) -> None:
        """Give the request up where it is and let it wait for a new attempt, or fail it."""
        self._leave_workers(request)
        if request.num_attempts >= self._max_attempts:
            del self._requests[request.request_id]
            self._outbox.fail(
                request.request_id,
                code="too_many_attempts",
                reason=f"given up after {request.num_attempts} attempts; the last: {reason}",
            )
            return
        self._outbox.add(RestartRequest(request_id=request.request_id, reason=reason))
        request.start_over()

    def fail(self, request: Request, *, code: str, reason: str) -> None:
        """The request is final as failed."""
        self.drop(request)
        self._outbox.fail(request.request_id, code=code, reason=reason)

    def drop(self, request: Request, *, committed_by: str = "") -> None:
        """The request is final already.

        committed_by: the VAE worker whose commit made it so, which has nothing more to free.
        """
        self._leave_workers(request, committed_by=committed_by)
        del self._requests[request.request_id]

    def lose_unet(self, incarnation: str) -> None:
        """Its requests begin again elsewhere; finished latents are on their own."""
        del self._unets[incarnation]
        for request in list(self._requests.values()):
            if request.unet == incarnation and request.stage in AT_UNET:
                self.restart(request, "unet worker lost")

    def lose_vae(self, incarnation: str) -> None:
        """Its decodes go to another one."""
        vae = self._vaes.pop(incarnation)
        for request_id in vae.decodes:
            self.decode_elsewhere(self._requests[request_id], "vae worker lost")

    def decode_elsewhere(self, request: Request, reason: str) -> None:
        """Give a decode up where it is; it begins again, or fails if it has begun too often."""
        if request.num_decodes >= self._max_attempts:
            self.fail(
                request,
                code="too_many_attempts",
                reason=f"given up after {request.num_decodes} decodes; the last: {reason}",
            )
            return
        self._cancel_decode(request)
        request.move_to(Stage.LATENTS)
        request.forget_decode()

    def _cancel_decode(self, request: Request) -> None:
        vae = self._vaes.get(request.vae)
        if vae and request.request_id in vae.decodes:
            vae.decodes.remove(request.request_id)
            cancel = messages.CancelDecode(
                epoch=self._outbox.epoch, request_id=request.request_id, attempt=request.attempt
            )
            self._outbox.send(request.vae, "control", cancel)

    def _leave_workers(self, request: Request, *, committed_by: str = "") -> None:
        if request.unet in self._unets and request.stage in AT_UNET:
            self._outbox.release(request.unet, request.request_id, request.attempt)
        vae = self._vaes.get(request.vae)
        if vae and committed_by == request.vae and request.request_id in vae.decodes:
            vae.decodes.remove(request.request_id)
        self._cancel_decode(request)
        if request.latents and not committed_by:
            self._outbox.release_latents(request.latents)
