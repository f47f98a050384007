"""Requests for the simulator: when they come and what they ask for; and traces of them as text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import pi, sin

from shared.errors import ConfigurationError
from shared.guidance_skip import SKIP_LEVELS

PATTERNS = ("poisson", "bursty", "step", "ramp", "wave", "backlog")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request. at_s: after the start. guidance_scale above 1 makes every step two rows.

    Raises:
        ValueError: There is no such level of `guidance_skip`.
    """

    at_s: float
    num_steps: int = 25
    guidance_scale: float = 5.0
    guidance_skip: str = "balanced"
    height: int = 0
    width: int = 0
    owner: str = ""
    deadline_ms: int = 0

    def __post_init__(self) -> None:
        """Check what a person may have misspelt in a trace."""
        if self.guidance_skip not in SKIP_LEVELS:
            raise ValueError(
                f"guidance_skip {self.guidance_skip!r} should be one of {', '.join(SKIP_LEVELS)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What requests ask for. Each field is chosen from with equal chances.

    sizes: (height, width) in pixels; (0, 0) is the profile's own.
    """

    num_steps: tuple[int, ...] = (4, 8, 15, 20, 25, 25, 30, 40)
    guidance_scales: tuple[float, ...] = (5.0, 5.0, 5.0, 1.0)
    guidance_skip: str = "balanced"
    sizes: tuple[tuple[int, int], ...] = ((0, 0),)


def make_arrivals(
    pattern: str, *, rate: float, duration_s: float, mix: Mix, seed: int
) -> list[Arrival]:
    """Return arrivals of a Poisson process whose rate follows a pattern.

    poisson: constant. bursty: 3 times the rate in a quarter of each 20 s and a third of it in
    the rest. step: the rate, 3 times it in the middle third, and back. ramp: from 0.2 to 1.8 times
    it. wave: a slow sine. backlog: all at once (rate x duration of them).

    Raises:
        ConfigurationError: There is no such pattern.
    """
    factors: dict[str, Callable[[float], float]] = {
        "poisson": lambda _: 1.0,
        "bursty": lambda at: 3.0 if at % 20 < 5 else 1 / 3,  # noqa: PLR2004
        "step": lambda at: 3.0 if 1 / 3 <= at / duration_s < 2 / 3 else 1.0,
        "ramp": lambda at: 0.2 + 1.6 * at / duration_s,
        "wave": lambda at: 1 + 0.8 * sin(4 * pi * at / duration_s),
    }
    chance = random.Random(seed)
    if pattern == "backlog":
        return [_draw(chance, mix, 0.0) for _ in range(round(rate * duration_s))]
    if pattern not in factors:
        raise ConfigurationError(f"pattern {pattern!r} should be one of {', '.join(PATTERNS)}")
    highest, at = 3.0 * rate, 0.0
    arrivals: list[Arrival] = []
    while True:
        at += chance.expovariate(highest)
        if at >= duration_s:
            return arrivals
        if chance.random() * highest < rate * factors[pattern](at):
            arrivals.append(_draw(chance, mix, at))


def _draw(chance: random.Random, mix: Mix, at_s: float) -> Arrival:
    height, width = chance.choice(mix.sizes)
    return Arrival(
        at_s=at_s,
        num_steps=chance.choice(mix.num_steps),
        guidance_scale=chance.choice(mix.guidance_scales),
        guidance_skip=mix.guidance_skip,
        height=height,
        width=width,
    )


def format_trace(arrivals: Iterable[Arrival]) -> str:
    """Return the arrivals as text, one JSON object a line."""
    return "".join(json.dumps(asdict(arrival)) + "\n" for arrival in arrivals)


def parse_trace(text: str, *, name: str = "the trace") -> list[Arrival]:
    """Return what `format_trace` wrote, or a person, in the order of time.

    Raises:
        ConfigurationError: A line is no arrival.
    """
    arrivals = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                arrivals.append(Arrival(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ConfigurationError(f"{name}, line {number}: {error}") from error
    return sorted(arrivals, key=lambda arrival: arrival.at_s)
