"""One simulation: arrivals, the scheduler's core, and device groups of simulated workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from services.scheduler.core.commands import FailRequest, Send
from services.scheduler.core.core import Core, CoreSettings
from services.scheduler.core.events import Event, Tick
from services.scheduler.devices.profile import Profile
from services.scheduler.planning.policy import Policy
from services.scheduler.simulation.arrivals import Arrival
from services.scheduler.simulation.device import Device
from services.scheduler.simulation.log import SimulationLog, ThetaSample
from services.scheduler.simulation.unet import SimulatedUnet
from services.scheduler.simulation.vae import SimulatedVae
from services.scheduler.simulation.worker_info import unet_info, vae_info
from services.scheduler.simulation.world import SimulationSettings, World
from shared import messages

__all__ = ["Simulation", "SimulationSettings"]

TICK_MS = 500.0
"""How often the scheduler looks at the clock, as its shell does."""


class Simulation:
    """One run.

    Args:
        profile: Of every device group.
        policy: What serves.
        arrivals: In the order of time.
        settings: The rest.
    """

    def __init__(
        self,
        profile: Profile,
        policy: Policy,
        arrivals: Sequence[Arrival],
        settings: SimulationSettings,
    ) -> None:
        self._world = World(
            durations=profile.durations,
            settings=settings,
            arrivals={f"r{i:06d}": arrival for i, arrival in enumerate(arrivals)},
            log=SimulationLog(num_requests=len(arrivals)),
            feed=self._feed,
            chance=Random(settings.seed),
        )
        self._core = Core(
            epoch=1_000,
            policy=policy,
            settings=CoreSettings(max_attempts=5, recovery_s=0.0, profiles=(profile,)),
            now=0.0,
        )
        self._inboxes: dict[str, Callable[[messages.Message], None]] = {}

    def run(self) -> SimulationLog:
        """Serve everything from the first arrival to the last picture, and return what was seen."""
        clock, log, settings = self._world.clock, self._world.log, self._world.settings
        self._feed(Tick())
        for number in range(settings.num_groups):
            self._add_group(f"g{number}")
        for number in range(settings.vaes_elsewhere):
            self._add_vae(f"elsewhere-{number}", Device(clock), 0)
        for request_id, arrival in self._world.arrivals.items():
            clock.at(arrival.at_s, lambda r=request_id: self._arrive(r))  # type: ignore[misc]
        clock.after(TICK_MS, self._tick)
        while not log.is_complete and clock.now < settings.max_s and clock.step():
            pass
        log.ended_at = clock.now
        return log

    # --- the workers ----------------------------------------------------------------------------

    def _add_group(self, group: str) -> None:
        """Register a UNet worker and the VAE workers beside it, on one device."""
        world = self._world
        device = Device(world.clock, world.profile.threads)
        info = unet_info(world.profile, group=group)
        vaes: list[SimulatedVae] = []

        def on_slot() -> None:
            for vae in vaes:
                vae.begin()
            self._note_threshold(info)

        unet = SimulatedUnet(info, device, world, on_slot)
        self._register(info, unet.receive)
        vaes += [
            self._add_vae(group, device, number) for number in range(world.settings.vaes_per_group)
        ]

    def _add_vae(self, group: str, device: Device, number: int) -> SimulatedVae:
        info = vae_info(self._world.profile, group=group, number=number)
        vae = SimulatedVae(info, device, self._world)
        self._register(info, vae.receive)
        return vae

    def _register(
        self, info: messages.WorkerInfo, receive: Callable[[messages.Message], None]
    ) -> None:
        self._inboxes[info.incarnation] = receive
        self._feed(messages.WorkerRegistered(worker=info))

    # --- the scheduler --------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        """Carry out the core's answer to an event."""
        clock = self._world.clock
        for command in self._core.on_event(event, clock.now):
            if isinstance(command, Send):
                receive = self._inboxes[command.incarnation]
                clock.after(
                    self._world.settings.message_ms,
                    lambda r=receive, m=command.message: r(m),  # type: ignore[misc]
                )
            elif isinstance(command, FailRequest):
                self._world.log.failed(command.request_id, command.code)

    def _tick(self) -> None:
        self._feed(Tick())
        self._world.clock.after(TICK_MS, self._tick)

    def _note_threshold(self, info: messages.WorkerInfo) -> None:
        unet = self._core.unets[info.incarnation]
        threshold = unet.threshold
        self._world.log.thetas.append(
            ThetaSample(
                at_s=self._world.clock.now,
                group=info.device_group,
                theta=threshold.value,
                unet_stretch=threshold.stretches.unet,
                vae_stretch=threshold.stretches.vae,
            )
        )

    def _arrive(self, request_id: str) -> None:
        arrival, now = self._world.arrivals[request_id], self._world.clock.now
        self._world.log.submitted(request_id, now)
        height, width = self._world.size(arrival)
        parameters = messages.ImageParameters(
            prompt="",
            negative_prompt="",
            seed=0,
            height=height,
            width=width,
            num_inference_steps=arrival.num_steps,
            guidance_scale=arrival.guidance_scale,
            sampler="ddim",
            guidance_skip=arrival.guidance_skip,
            output_format="png",
            output_compression=100,
            model=self._world.profile.model_id,
        )
        self._feed(
            messages.GenerateImage(
                request_id=request_id,
                job_id=request_id,
                owner=arrival.owner,
                priority=0,
                deadline_ms=arrival.deadline_ms,
                submitted_at=now,
                parameters=parameters,
            )
        )
