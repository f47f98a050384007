"""How fast the device is now: shared machines change their speed by tens of percent in minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Protocol

import numpy as np

from services.scheduler.devices.profile import Profile

FEW_ROWS: Final = 4
"""A slot that small stands for those bound by calls and threads that wait for each other; they
slow down by another factor than full ones where a machine's cores come to share one of the host."""


class TimesSlots(Protocol):
    """The real services, or the simulator."""

    def slot_ms(self, *, size: str, rows: int, threads: int) -> float:
        """Return the median of slots alone, of dummy rows; nothing serves meanwhile or after."""
        ...


def device_slowdown(stack: TimesSlots, profile: Profile, *, rows: int = 0) -> float:
    """Return how many times as long a slot alone takes as in the profile. 0: a full one."""
    size = profile.slots[0].key
    rows, kind = rows or profile.knee(size), profile.alone_kind(size)
    now_ms = stack.slot_ms(size=size, rows=rows, threads=kind.unet_threads)
    return now_ms / profile.slot_ms(size, rows, kind)[0]


def slowdowns_by_rows(stack: TimesSlots, profile: Profile) -> dict[int, float]:
    """Return the slowdown of a small slot and of a full one."""
    sizes = (FEW_ROWS, profile.knee(profile.slots[0].key))
    return {rows: device_slowdown(stack, profile, rows=rows) for rows in sizes}


def slowed_down(profile: Profile, slowdowns: Mapping[int, float]) -> Profile:
    """Return the profile when slots of so many rows take so many times as long.

    Slots of other sizes in between and beyond, decodes and prompts accordingly.
    """
    sizes = sorted(slowdowns)
    factors = [slowdowns[rows] for rows in sizes]

    def scaled(durations: Mapping[int, float]) -> dict[int, float]:
        return {rows: float(np.interp(rows, sizes, factors)) * ms for rows, ms in durations.items()}

    return replace(
        profile,
        slots=tuple(
            replace(slot, step_ms=scaled(slot.step_ms), chunks_ms=scaled(slot.chunks_ms))
            for slot in profile.slots
        ),
        decodes=tuple(
            replace(decode, chunk_ms=tuple(factors[-1] * ms for ms in decode.chunk_ms))
            for decode in profile.decodes
        ),
        encode_ms=factors[0] * profile.encode_ms,
    )
