"""`synerdiff simulate`: the scheduler's own core against a profile, without any worker."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.lazy_command import load_function
from services.scheduler.devices.profile import Profile
from services.scheduler.devices.profile_file import parse_profile
from services.scheduler.planning.policies import POLICY_NAMES, PolicyOptions, make_policy
from services.scheduler.planning.threshold import ThresholdRule
from services.scheduler.simulation.arrivals import (
    PATTERNS,
    Arrival,
    Mix,
    format_trace,
    make_arrivals,
    parse_trace,
)
from services.scheduler.simulation.log import SimulationLog
from services.scheduler.simulation.simulator import Simulation, SimulationSettings
from shared.errors import ConfigurationError
from shared.settings import SHIPPED_PROFILES

PLOT = "bench.simulation_plot:plot_runs"
ASSUMED = SHIPPED_PROFILES / "assumed" / "a100-sd15.json"

THRESHOLD_RULES = {
    "stepwise": ThresholdRule(),
    "reversed": ThresholdRule(is_reversed=True),
    "fixed at 0.85": ThresholdRule(is_adaptive=False, first_value=0.85),
    "fixed at 0.3": ThresholdRule(is_adaptive=False, first_value=0.3),
}
EXPERIMENTS = {"step": "load step of 3 x and back", "bursty": "bursts", "ramp": "slow ramp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A simulation that is over, under the name that its curve has."""

    name: str
    log: SimulationLog
    figures: dict[str, Any]


def simulate(
    profile: Annotated[
        Path, typer.Option(help="A profile's file.", show_default="profiles/assumed/a100-sd15.json")
    ] = ASSUMED,
    policy: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(POLICY_NAMES)}; may be repeated.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second, on average.", min=0.001)] = 2.0,
    duration: Annotated[float, typer.Option(help="Seconds of arrivals.", min=1)] = 120.0,
    pattern: Annotated[str, typer.Option(help=f"Of {', '.join(PATTERNS)}.")] = "poisson",
    trace: Annotated[
        Path | None, typer.Option(help="Replay the arrivals in this file instead.")
    ] = None,
    save_trace: Annotated[Path | None, typer.Option(help="Write the arrivals there.")] = None,
    groups: Annotated[int, typer.Option(help="Device groups.", min=1)] = 1,
    vaes: Annotated[int, typer.Option(help="VAE workers on each device.", min=1)] = 1,
    vaes_elsewhere: Annotated[
        int, typer.Option(help="VAE workers with a device of their own.", min=0)
    ] = 0,
    size: Annotated[
        list[str] | None, typer.Option(help="WxH of pictures, with equal chances; may be repeated.")
    ] = None,
    experiment: Annotated[
        str, typer.Option(help="'threshold' compares the threshold's rules under three loads.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="Where the report (.json) and its plots (.png) go.")
    ] = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Serve arrivals with the real scheduler on simulated devices; return the figures."""
    known = parse_profile(_read(profile), name=str(profile))
    settings = SimulationSettings(
        num_groups=groups, vaes_per_group=vaes, vaes_elsewhere=vaes_elsewhere, seed=seed
    )
    mix = Mix(sizes=tuple(_parse_size(text) for text in size)) if size else Mix()
    if experiment == "threshold":
        return _compare_thresholds(known, settings, rate, duration, output)
    if experiment:
        raise ConfigurationError(f"--experiment is {experiment!r}; it should be 'threshold'")
    arrivals = (
        parse_trace(_read(trace), name=str(trace))
        if trace
        else make_arrivals(pattern, rate=rate, duration_s=duration, mix=mix, seed=seed)
    )
    if save_trace:
        save_trace.write_text(format_trace(arrivals))
    runs = []
    for name in policy or ["synerdiff"]:
        if name not in POLICY_NAMES:
            raise ConfigurationError(f"--policy {name} should be one of {', '.join(POLICY_NAMES)}")
        runs.append(_run(name, name, PolicyOptions(), known, arrivals, settings))
    report: dict[str, Any] = {
        "profile": {"model_id": known.model_id, "source": known.source},
        "is_simulated": True,
        "policies": {run.name: run.figures for run in runs},
    }
    if output:
        _write(output, report, runs)
    return report


def _run(
    name: str,
    policy: str,
    options: PolicyOptions,
    profile: Profile,
    arrivals: list[Arrival],
    settings: SimulationSettings,
) -> Run:
    log = Simulation(profile, make_policy(policy, options), arrivals, settings).run()
    return Run(name=name, log=log, figures=log.summary())


def _compare_thresholds(
    profile: Profile,
    settings: SimulationSettings,
    rate: float,
    duration: float,
    output: Path | None,
) -> dict[str, Any]:
    """Compare the rules' direction with the other one and with thresholds that rest."""
    report: dict[str, Any] = {
        "profile": {"model_id": profile.model_id, "source": profile.source},
        "is_simulated": True,
    }
    for pattern in EXPERIMENTS:
        arrivals = make_arrivals(
            pattern, rate=rate, duration_s=duration, mix=Mix(), seed=settings.seed
        )
        runs = [
            _run(name, "synerdiff", PolicyOptions(rule=rule), profile, arrivals, settings)
            for name, rule in THRESHOLD_RULES.items()
        ]
        report[pattern] = {run.name: run.figures for run in runs}
        if output:
            path = output.with_name(f"{output.stem}-{pattern}{output.suffix}")
            _write(path, report[pattern], runs)
    if output:
        output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of "WxH"."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ConfigurationError(f"--size is {text!r}; it should be WxH in pixels, as in 512x768")
    return int(height), int(width)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {error.strerror}") from error


def _write(path: Path, report: dict[str, Any], runs: list[Run]) -> None:
    """Write the report and, where matplotlib is there, its plot beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    try:
        plot_runs = load_function(PLOT)
    except ConfigurationError:  # matplotlib is an extra
        typer.echo("no plot: it needs pip install 'synerdiff[dev]'", err=True)
        return
    plot_runs(path.with_suffix(".png"), {run.name: run.log for run in runs})
