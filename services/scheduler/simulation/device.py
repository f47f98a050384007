"""A simulated device: a forward, chunks and commits in flight, each slowing the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from services.scheduler.simulation.clock import Clock
from services.scheduler.simulation.rates import Rates

FORWARD = "forward"
"""The owner of what the UNet worker has in flight; of a slot in parts, of those that go on."""

WAITING = "waiting parts"
"""The owner of its other parts: they wait while chunks run, unless the first ones are done."""

_UNET = (FORWARD, WAITING)


@dataclass(slots=True, kw_only=True)
class _Job:
    """left: of the work, from 1 to 0. version: of the end that is scheduled."""

    rates: Rates
    on_done: Callable[[float], None]
    threads: int
    is_commit: bool
    left: float = 1.0
    elapsed_ms: float = 0.0
    version: int = 0


class Device:
    """What runs on one device, and what its workers know of each other.

    running_seq: of the slot that runs, or the next number after the last one's end; as in the
    header of the UNet worker's pool. unet_threads, vae_threads: as last set by either side, while
    both are busy.

    Args:
        clock: The simulation's.
        cores: That commits take a share of; 0 for none.
    """

    def __init__(self, clock: Clock, cores: int = 0) -> None:
        self.running_seq = -1
        self.unet_threads = 0
        self.vae_threads = 0
        self._clock = clock
        self._cores = cores
        self._jobs: dict[str, _Job] = {}
        self._updated_at = clock.now

    def is_busy(self, owner: str) -> bool:
        """Return whether a worker has something in flight."""
        return owner in self._jobs

    def begin(
        self,
        owner: str,
        rates: Rates,
        on_done: Callable[[float], None],
        *,
        threads: int,
        is_commit: bool = False,
    ) -> None:
        """Let something more be in flight.

        on_done: is told how many milliseconds it took. is_commit: beside which rates stay as they
        are, but cores are shared evenly where there are more threads.
        """
        self._advance()
        self._jobs[owner] = _Job(rates=rates, on_done=on_done, threads=threads, is_commit=is_commit)
        self._schedule()

    def _duration_ms(self, owner: str) -> float:
        """Return the duration of the whole job, as long as nothing begins or ends."""
        rates = self._jobs[owner].rates
        if self._waits(owner):
            return inf
        is_beside = (
            self._has_chunks() if owner in _UNET else any(part in self._jobs for part in _UNET)
        )
        return (rates.beside_ms if is_beside else rates.alone_ms) * self._crowding()

    def _has_chunks(self) -> bool:
        return any(name not in _UNET and not job.is_commit for name, job in self._jobs.items())

    def _waits(self, owner: str) -> bool:
        return owner == WAITING and FORWARD in self._jobs and self._has_chunks()

    def _crowding(self) -> float:
        """Return threads for each core while pictures are committed; nothing else has more."""
        if not self._cores or not any(job.is_commit for job in self._jobs.values()):
            return 1.0
        threads = sum(job.threads for name, job in self._jobs.items() if not self._waits(name))
        return max(threads / self._cores, 1.0)

    def _advance(self) -> None:
        """Bring what is in flight up to now, at the rates so far."""
        elapsed_ms = (self._clock.now - self._updated_at) * 1000
        self._updated_at = self._clock.now
        for owner, job in self._jobs.items():
            job.left -= elapsed_ms / self._duration_ms(owner)
            job.elapsed_ms += elapsed_ms

    def _schedule(self) -> None:
        """Say anew when what is in flight is over."""
        for owner, job in self._jobs.items():
            job.version += 1
            left_ms = max(job.left, 0.0) * self._duration_ms(owner)
            if left_ms == inf:
                continue
            self._clock.after(
                left_ms,
                lambda o=owner, j=job, v=job.version: self._finish(o, j, v),  # type: ignore[misc]
            )

    def _finish(self, owner: str, job: _Job, version: int) -> None:
        if job.version != version or self._jobs.get(owner) is not job:
            return
        self._advance()
        del self._jobs[owner]
        self._schedule()
        job.on_done(job.elapsed_ms)
