"""Who competes in `bench policies`: every policy, with skipping and without, and parts left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from bench.whole_batches import dynamic_batching, static_batching
from services.scheduler.planning.continuous import ContinuousParallel, ContinuousSerial
from services.scheduler.planning.policies import PolicyOptions
from services.scheduler.planning.policies import make_policy as make_own_policy
from services.scheduler.planning.policy import Policy
from services.scheduler.planning.synerdiff import SynerDiff

BASELINES = ("static", "dynamic", "continuous-serial", "continuous-parallel")
"""At their best: batch cap and threads from the profile. They don't skip guidance by themselves."""

PARTS = ("chunking", "skip", "planning", "feedback")
"""Of synerdiff, each of which can be left out."""


def _baseline(kind: Callable[..., Policy], options: PolicyOptions, *, skips: bool) -> Policy:
    return kind(max_rows=options.max_rows, skips=skips)


def _naive(options: PolicyOptions) -> Policy:
    return ContinuousParallel(max_rows=options.max_rows, uses_default_threads=True)


def _without(part: str, options: PolicyOptions) -> Policy:
    policy = make_own_policy("synerdiff", options)
    assert isinstance(policy, SynerDiff)
    switches = {part: False}
    return replace(policy, **switches)  # type: ignore[arg-type]  # names of flags alone


_BASELINE_KINDS: Mapping[str, Callable[..., Policy]] = {
    "static": static_batching,
    "dynamic": dynamic_batching,
    "continuous-serial": ContinuousSerial,
    "continuous-parallel": ContinuousParallel,
}

POLICIES: Mapping[str, Callable[[PolicyOptions], Policy]] = {
    **{name: partial(_baseline, kind, skips=False) for name, kind in _BASELINE_KINDS.items()},
    **{
        f"{name}-with-skip": partial(_baseline, kind, skips=True)
        for name, kind in _BASELINE_KINDS.items()
    },
    "continuous-parallel-naive": _naive,
    "synerdiff": partial(make_own_policy, "synerdiff"),
    **{f"synerdiff-without-{part}": partial(_without, part) for part in PARTS},
}
"""The product's two and those that it is compared with, by name."""


def make_policy(name: str, options: PolicyOptions | None = None) -> Policy:
    """Return the policy of that name, which may be a contender's.

    Raises:
        KeyError: There is none.
    """
    return POLICIES[name](options or PolicyOptions())


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to serve."""

    name: str
    policy: str
    """A name in `POLICIES`."""
    has_default_threads: bool = False
    """Whether its workers run with OpenMP's own settings, where all threads share each operation,
    as most people's do."""


NAIVE = Contender(
    name="continuous-parallel, default threads",
    policy="continuous-parallel-naive",
    has_default_threads=True,
)
TUNED = tuple(Contender(name=name, policy=name) for name in BASELINES)
"""Baselines at their best: batch cap and threads from the profile."""

EQUAL_SKIP = tuple(
    Contender(name=name, policy=name)
    for name in (f"{baseline}-with-skip" for baseline in BASELINES)
)
SYNERDIFF = Contender(name="synerdiff", policy="synerdiff")
WITHOUT = tuple(
    Contender(name=name, policy=name) for name in (f"synerdiff-without-{part}" for part in PARTS)
)
ALL = (NAIVE, *TUNED, *EQUAL_SKIP, SYNERDIFF, *WITHOUT)
BY_NAME = {contender.name: contender for contender in ALL}
