"""CPU threads of the two sides, for policies that don't plan."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.devices.profile import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadSplit:
    """CPU threads of each side, alone and beside each other; 0 leaves the library's default."""

    unet_alone: int
    unet_beside: int
    vae_alone: int
    vae_beside: int

    @classmethod
    def best(cls, profile: Profile, size: str, rows: int) -> ThreadSplit:
        """The profile's fastest; where it has no slots beside chunks, a quarter for decodes."""
        threads = profile.threads
        decode = profile.decode(size)
        alone = profile.alone_kind(size).unet_threads
        beside = profile.beside_kinds(size)
        if beside:
            most = max(kind.chunks for kind in beside)
            best = min(
                (kind for kind in beside if kind.chunks == most),
                key=lambda kind: max(profile.slot_ms(size, rows, kind)),
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
