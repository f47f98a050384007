"""What a profile says that rows and decodes would take with perfect overlap and no overhead."""

from __future__ import annotations

from itertools import combinations

from services.scheduler.devices.profile import Profile

Activity = tuple[float, float, float]
"""Rows done, decodes done, in so many ms."""


def ceiling_s(profile: Profile, *, num_rows: float, num_decodes: float) -> float:
    """Return the least time for so many rows and decodes of the profile's own size.

    A linear programme: how often each activity of the profile is done, so that all rows and all
    decodes are done in the least time. With two conditions, two activities are enough.
    """
    activities = _activities(profile)
    best_ms = float("inf")
    for rows, decodes, ms in activities:
        if (rows or not num_rows) and (decodes or not num_decodes):
            needs = [num_rows / rows if rows else 0.0, num_decodes / decodes if decodes else 0.0]
            best_ms = min(best_ms, max(needs) * ms)
    for (rows_a, decodes_a, ms_a), (rows_b, decodes_b, ms_b) in combinations(activities, 2):
        determinant = rows_a * decodes_b - rows_b * decodes_a
        if abs(determinant) < 1e-9:  # noqa: PLR2004  the same mixture of both
            continue
        times_a = (num_rows * decodes_b - rows_b * num_decodes) / determinant
        times_b = (rows_a * num_decodes - num_rows * decodes_a) / determinant
        if times_a >= 0 and times_b >= 0:
            best_ms = min(best_ms, times_a * ms_a + times_b * ms_b)
    return best_ms / 1000


def _activities(profile: Profile) -> list[Activity]:
    """Return each measured slot, alone or with chunks beside it all along, and a decode alone."""
    key = profile.slots[0].key
    decode = profile.decode(key)
    chunks_of_a_decode = len(decode.chunk_ms) if decode else 1
    activities: list[Activity] = []
    for timing in profile.slots:
        if timing.key == key:
            for rows, step_ms in timing.step_ms.items():
                decodes, ms = 0.0, step_ms
                if timing.kind.chunks:
                    ms = profile.beside_ms(key, rows, timing.kind)
                    chunk_ms = timing.chunks_ms[rows] / timing.kind.chunks
                    decodes = ms / chunk_ms / chunks_of_a_decode
                activities.append((rows, decodes, ms))
    if decode:
        activities.append((0.0, 1.0, sum(decode.chunk_ms)))
    return activities
