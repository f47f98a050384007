"""Turns by time on one device: start-time fair queueing (Goyal, Vin and Chen, SIGCOMM 1996).

Each key's next slot starts, in virtual time, when its last one has finished, or now if that is
past; the key that starts first has the next turn. So keys that always have work get equal time,
however long their slots are, and one that was away has no claim to what it has missed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class FairTurns(Generic[K]):
    """Who has had how much of the device."""

    virtual_ms: float = 0.0
    """When the last slot started, in virtual time."""
    finished_ms: Mapping[K, float] = field(default_factory=dict)
    """When each key's last slot finishes, likewise; only of those that lie ahead."""

    def start_ms(self, key: K) -> float:
        """Return when a slot of that key would start; the least is next."""
        return max(self.finished_ms.get(key, 0.0), self.virtual_ms)

    def after(self, key: K, ms: float) -> FairTurns[K]:
        """Return the turns after a slot of that key which takes so long."""
        start_ms = self.start_ms(key)
        finished_ms = {
            other: at_ms for other, at_ms in self.finished_ms.items() if at_ms > start_ms
        }
        return FairTurns(virtual_ms=start_ms, finished_ms={**finished_ms, key: start_ms + ms})
