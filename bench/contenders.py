"""Who competes in `bench policies`: every policy, with skipping and without, and parts left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to serve.

    policy: as in the settings. switches: further SYNERDIFF_* variables of its scheduler.
    has_default_threads: its workers run with OpenMP's own settings, as most people's do.
    """

    name: str
    policy: str
    switches: Mapping[str, str] = field(default_factory=dict)
    has_default_threads: bool = False


NAIVE = Contender(
    name="continuous-parallel, default threads",
    policy="continuous-parallel-naive",
    has_default_threads=True,
)
TUNED = tuple(
    Contender(name=name, policy=name)
    for name in ("static", "dynamic", "continuous-serial", "continuous-parallel")
)
"""Baselines at their best: batch cap and threads from the profile."""

EQUAL_SKIP = tuple(
    Contender(
        name=f"{one.name}, skipping",
        policy=one.policy,
        switches={"SYNERDIFF_POLICY_SKIP": "true"},
    )
    for one in TUNED
)
SYNERDIFF = Contender(name="synerdiff", policy="synerdiff")
WITHOUT = tuple(
    Contender(
        name=f"synerdiff without {part}",
        policy="synerdiff",
        switches={f"SYNERDIFF_POLICY_{part.upper()}": "false"},
    )
    for part in ("chunking", "skip", "planning", "feedback")
)
ALL = (NAIVE, *TUNED, *EQUAL_SKIP, SYNERDIFF, *WITHOUT)
BY_NAME = {one.name: one for one in ALL}
