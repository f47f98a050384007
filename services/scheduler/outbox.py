"""The commands of one event, in order, and the messages that several handlers send."""

from __future__ import annotations

from collections.abc import Iterable

from services.scheduler.commands import Command, FailRequest, Lane, ReportProgress, Send
from services.scheduler.state import Request
from shared import messages


class Outbox:
    """Collects what is to be done about an event.

    Args:
        epoch: Goes into every command to a worker.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self._commands: list[Command] = []

    def take(self) -> list[Command]:
        """Everything since the last time."""
        commands, self._commands = self._commands, []
        return commands

    def add(self, command: Command) -> None:
        """One command more."""
        self._commands.append(command)

    def send(self, incarnation: str, lane: Lane, message: messages.Message) -> None:
        """A message to a worker."""
        self.add(Send(incarnation=incarnation, lane=lane, message=message))

    def fail(self, request_id: str, *, code: str, reason: str) -> None:
        """A request is final as failed."""
        self.add(FailRequest(request_id=request_id, code=code, reason=reason))

    def ask_what_is_held(self, incarnation: str) -> None:
        """A worker is to drop what is queued there, and to announce the rest."""
        self.send(incarnation, "control", messages.BeginEpoch(epoch=self.epoch))

    def release(self, unet: str, request_id: str, attempt: str) -> None:
        """A UNet worker is to forget a request."""
        release = messages.ReleaseRequest(epoch=self.epoch, request_id=request_id, attempt=attempt)
        self.send(unet, "control", release)

    def release_latents(self, latents: messages.LatentsFinished) -> None:
        """Their producer has its pool slot back."""
        handle = latents.handle
        release = messages.ReleaseLatents(slot=handle.slot, generation=handle.generation)
        self.send(handle.owner, "control", release)

    def report(self, requests: Iterable[Request]) -> None:
        """Tell the gateways how far requests are."""
        items = tuple(
            messages.RequestProgress(
                request_id=request.request_id,
                state=request.stage.value,
                step=request.done_step,
                num_steps=request.num_forwards,
            )
            for request in requests
        )
        if items:
            self.add(ReportProgress(items=items))
