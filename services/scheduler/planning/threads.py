"""CPU threads of the two sides, for policies that don't plan."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.devices.durations import Durations


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadSplit:
    """CPU threads of each side, alone and beside each other; 0 leaves the library's default."""

    unet_alone: int
    unet_beside: int
    vae_alone: int
    vae_beside: int

    @classmethod
    def best(cls, durations: Durations, size: str, rows: int) -> ThreadSplit:
        """Return the profile's fastest; without slots beside chunks, a quarter for decodes."""
        threads = durations.profile.threads
        decode = durations.decode(size)
        alone = durations.alone_kind(size).unet_threads
        beside = durations.beside_kinds(size)
        if beside:
            most = max(kind.chunks for kind in beside)
            best = min(
                (kind for kind in beside if kind.chunks == most),
                key=lambda kind: max(durations.slot_ms(size, rows, kind)),
            )
            unet_beside, vae_beside = best.unet_threads, best.vae_threads
        else:
            vae_beside = max(1, threads // 4) if threads else 0
            unet_beside = max(1, threads - vae_beside) if threads else 0
        return cls(
            unet_alone=alone,
            unet_beside=unet_beside,
            vae_alone=decode.threads if decode else threads,
            vae_beside=vae_beside,
        )


DEFAULT_THREADS = ThreadSplit(unet_alone=0, unet_beside=0, vae_alone=0, vae_beside=0)
"""What most people run: each process with the library's default, as many threads as cores."""
