"""How fast the device is now: shared machines change their speed by tens of percent in minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from services.scheduler.profile import Profile


class TimesSlots(Protocol):
    """The real services, or the simulator."""

    def slot_ms(self, *, size: str, rows: int, threads: int) -> float:
        """Median of slots alone, of dummy rows, taken now; nothing serves meanwhile or after."""
        ...


def device_slowdown(stack: TimesSlots, profile: Profile) -> float:
    """How much longer a full slot alone takes now than when the profile was measured."""
    size = profile.slots[0].key
    rows, kind = profile.knee(size), profile.alone_kind(size)
    now_ms = stack.slot_ms(size=size, rows=rows, threads=kind.unet_threads)
    return now_ms / profile.slot_ms(size, rows, kind)[0]


def slowed_down(profile: Profile, factor: float) -> Profile:
    """The profile of the same device when everything takes so many times as long."""

    def scaled(durations: Mapping[int, float]) -> dict[int, float]:
        return {rows: factor * ms for rows, ms in durations.items()}

    return replace(
        profile,
        slots=tuple(
            replace(one, step_ms=scaled(one.step_ms), chunks_ms=scaled(one.chunks_ms))
            for one in profile.slots
        ),
        decodes=tuple(
            replace(one, chunk_ms=tuple(factor * ms for ms in one.chunk_ms))
            for one in profile.decodes
        ),
        encode_ms=factor * profile.encode_ms,
    )
