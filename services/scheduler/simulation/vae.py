"""A simulated VAE worker: the real one's protocol, the profile's durations."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from services.scheduler.simulation.device import Device
from services.scheduler.simulation.rates import Rates, chunk_rates
from services.scheduler.simulation.world import World
from shared import messages


@dataclass(slots=True, kw_only=True)
class SimulatedGrant:
    """Chunks of a grant that are left to run."""

    command: messages.GrantChunks
    left: int


@dataclass(slots=True, kw_only=True)
class SimulatedDecode:
    """done: chunks. grant_ms: that the grant under way has taken."""

    command: messages.DecodeLatents
    grants: deque[SimulatedGrant] = field(default_factory=deque)
    done: int = 0
    grant_ms: float = 0.0


class SimulatedVae:
    """One worker.

    Args:
        info: As it registers.
        device: Where it runs.
        world: The rest.
    """

    def __init__(self, info: messages.WorkerInfo, device: Device, world: World) -> None:
        self.info = info
        self._device = device
        self._world = world
        self._decodes: dict[str, SimulatedDecode] = {}

    def receive(self, message: messages.Message) -> None:
        """Take a message of the scheduler's."""
        match message:
            case messages.DecodeLatents(request_id=request_id):
                self._decodes[request_id] = SimulatedDecode(command=message)
            case messages.GrantChunks(request_id=request_id) if request_id in self._decodes:
                grant = SimulatedGrant(command=message, left=message.chunks)
                self._decodes[request_id].grants.append(grant)
            case messages.CancelDecode(request_id=request_id):
                self._decodes.pop(request_id, None)
        self.begin()

    def begin(self) -> None:
        """Run the next chunk that may run, if none does."""
        if self._device.is_busy(self.info.incarnation):
            return
        for decode in self._decodes.values():
            if decode.grants and self._may_begin(decode.grants[0].command):
                self._begin_chunk(decode, decode.grants[0].command)
                return

    def _may_begin(self, grant: messages.GrantChunks) -> bool:
        return not grant.beside_seq or self._device.running_seq >= grant.beside_seq

    def _begin_chunk(self, decode: SimulatedDecode, grant: messages.GrantChunks) -> None:
        device, world = self._device, self._world
        device.vae_threads = grant.threads
        rates = chunk_rates(
            world.durations,
            world.key(grant.request_id),
            decode.done,
            unet_threads=device.unet_threads,
            vae_threads=grant.threads,
        )
        device.begin(
            self.info.incarnation,
            world.vary(rates),
            lambda duration: self._chunk_done(decode, duration),
            threads=grant.threads,
        )

    def _chunk_done(self, decode: SimulatedDecode, duration_ms: float) -> None:
        command = decode.command
        if self._decodes.get(command.request_id) is decode:
            decode.done += 1
            decode.grant_ms += duration_ms
            decode.grants[0].left -= 1
            if not decode.grants[0].left:
                self._report(decode)
            if decode.done >= self.info.num_chunks:
                del self._decodes[command.request_id]
                self._commit(command)
        self.begin()

    def _report(self, decode: SimulatedDecode) -> None:
        """Report that a grant is used up."""
        decode.grants.popleft()
        self._world.tell(
            messages.ChunksDecoded(
                incarnation=self.info.incarnation,
                request_id=decode.command.request_id,
                attempt=decode.command.attempt,
                chunks_done=decode.done,
                duration_ms=decode.grant_ms,
            )
        )
        decode.grant_ms = 0.0

    def _commit(self, command: messages.DecodeLatents) -> None:
        """Make the file and store it, while the next decode begins. It takes a core, not a GPU."""
        world, commit_ms = self._world, self._world.settings.commit_ms
        if world.profile.device != "cpu":
            world.clock.after(commit_ms, lambda: self._committed(command))
            return
        self._device.begin(
            f"{self.info.incarnation} commits {command.request_id}",
            Rates(alone_ms=commit_ms, beside_ms=commit_ms),
            lambda _: self._committed(command),
            threads=1,
            is_commit=True,
        )

    def _committed(self, command: messages.DecodeLatents) -> None:
        self._world.log.finished(command.request_id, self._world.clock.now)
        self._world.tell(
            messages.ImageDecoded(
                incarnation=self.info.incarnation,
                request_id=command.request_id,
                attempt=command.attempt,
                decode_ms=0.0,
                transport="shm",
            )
        )
