"""What simulated workers share: the clock, the profile, chance, and the way to the scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from services.scheduler.core.events import Event
from services.scheduler.devices.durations import Durations
from services.scheduler.devices.profile import Profile, make_key
from services.scheduler.simulation.arrivals import Arrival
from services.scheduler.simulation.clock import Clock
from services.scheduler.simulation.log import SimulationLog
from services.scheduler.simulation.rates import Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """The world around the core.

    vaes_elsewhere: VAE workers that have a device of their own, as fast as the others' alone.
    message_ms: one way between scheduler and worker. slot_overhead_ms: of a slot, beside the
    forward that profiles time: rows gathered, guidance, the update (0.6 to 1.4 ms by the real
    worker on two cores). services_ms: that all other processes take of the cores for each slot,
    where forwards run on them and wait (3.7 ms for each slot and 14 for each picture, by the
    processor time of all threads at three loads). commit_ms: from the last chunk to the final
    state. jitter: standard deviation of a duration's factor. max_s: simulated time to give up at.
    """

    num_groups: int = 1
    vaes_per_group: int = 1
    vaes_elsewhere: int = 0
    message_ms: float = 1.0
    slot_overhead_ms: float = 1.5
    services_ms: float = 3.7
    commit_ms: float = 14.0
    jitter: float = 0.03
    max_s: float = 36_000.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """See the module. arrivals: by request id. feed: give the scheduler an event now."""

    durations: Durations
    settings: SimulationSettings
    arrivals: Mapping[str, Arrival]
    log: SimulationLog
    feed: Callable[[Event], None]
    clock: Clock = field(default_factory=Clock)
    chance: random.Random = field(default_factory=random.Random)

    @property
    def profile(self) -> Profile:
        """Return the profile of every device."""
        return self.durations.profile

    def tell(self, event: Event) -> None:
        """Send the scheduler an event; it arrives a little later."""
        self.clock.after(self.settings.message_ms, lambda: self.feed(event))

    @property
    def slot_overhead_ms(self) -> float:
        """Return what a slot takes on the profile's device beside its forward."""
        services_ms = self.settings.services_ms if self.profile.device == "cpu" else 0.0
        return self.settings.slot_overhead_ms + services_ms

    def vary(self, rates: Rates) -> Rates:
        """Return the durations as they happen to be this time."""
        factor = max(1 + self.chance.gauss(0, self.settings.jitter), 0.2)
        return Rates(alone_ms=rates.alone_ms * factor, beside_ms=rates.beside_ms * factor)

    def size(self, arrival: Arrival) -> tuple[int, int]:
        """Return its picture's height and width; the profile's own where it names none."""
        if arrival.height and arrival.width:
            return arrival.height, arrival.width
        height, _, width = self.profile.slots[0].key.partition("x")
        return int(height), int(width)

    def key(self, request_id: str) -> str:
        """Return the profile's name of a request's size."""
        return make_key(*self.size(self.arrivals[request_id]))
