"""When a service that has ended is started again, and when it is given up."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Final

_OUTSIDE_SIGNALS: Final = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT})


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When to restart.

    What counts is the cause: a kill from outside never does, nor a death under a hardship such as a
    full disk, which is waited out.
    """

    first_delay_s: float = 0.1
    """Doubles with every quick death in a row, up to its maximum."""
    max_delay_s: float = 5.0
    quick_death_s: float = 20.0
    """A life shorter than this ends in a quick death."""
    max_quick_deaths: int = 6
    """So many in a row of the service's own making, and it is given up."""


@dataclass(slots=True)
class DeathCount:
    """The quick deaths in a row of one service, and what follows from the next one."""

    policy: RestartPolicy
    num_quick: int = 0
    num_own: int = 0

    def delay_after(
        self, *, exit_code: int, lived_s: float, is_final: bool = False, is_excused: bool = False
    ) -> float | None:
        """Return the seconds until the restart, None to give up."""
        if lived_s >= self.policy.quick_death_s:
            self.num_quick = self.num_own = 0
        self.num_quick += 1
        if not is_excused and exit_code not in _OUTSIDE_SIGNALS:
            self.num_own += 1
            if is_final or self.num_own >= self.policy.max_quick_deaths:
                return None
        return min(
            self.policy.first_delay_s * 2.0 ** min(self.num_quick - 1, 16), self.policy.max_delay_s
        )
