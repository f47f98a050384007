"""Who competes in `bench policies`: every policy, with skipping and without, and parts left out."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.policies import BASELINES, PARTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to serve.

    policy: as in the settings. has_default_threads: its workers run with OpenMP's own settings, and
    all threads share each operation, as most people's do.
    """

    name: str
    policy: str
    has_default_threads: bool = False


NAIVE = Contender(
    name="continuous-parallel, default threads",
    policy="continuous-parallel-naive",
    has_default_threads=True,
)
TUNED = tuple(Contender(name=name, policy=name) for name in BASELINES)
"""Baselines at their best: batch cap and threads from the profile."""

EQUAL_SKIP = tuple(
    Contender(name=name, policy=name) for name in (f"{one}-with-skip" for one in BASELINES)
)
SYNERDIFF = Contender(name="synerdiff", policy="synerdiff")
WITHOUT = tuple(
    Contender(name=name, policy=name) for name in (f"synerdiff-without-{part}" for part in PARTS)
)
ALL = (NAIVE, *TUNED, *EQUAL_SKIP, SYNERDIFF, *WITHOUT)
BY_NAME = {one.name: one for one in ALL}
