"""From settings to the core's own values: the policy's options, and profiles from their files."""

from __future__ import annotations

from pathlib import Path

from services.scheduler.devices.profile import Profile
from services.scheduler.devices.profile_file import parse_profile
from services.scheduler.planning.policies import PolicyOptions
from services.scheduler.planning.threshold import ThresholdRule
from shared.errors import ConfigurationError
from shared.profile_files import profile_paths
from shared.settings import SchedulerSettings


def policy_options(settings: SchedulerSettings) -> PolicyOptions:
    """Return what the settings tune.

    Raises:
        ConfigurationError: The threshold begins below its least value.
    """
    if settings.threshold_first < settings.threshold_min:
        raise ConfigurationError(
            f"SYNERDIFF_THRESHOLD_FIRST={settings.threshold_first} should not be below "
            f"SYNERDIFF_THRESHOLD_MIN={settings.threshold_min}"
        )
    return PolicyOptions(
        max_rows=settings.max_rows,
        rule=ThresholdRule(min_value=settings.threshold_min, first_value=settings.threshold_first),
        max_decode_wait_s=settings.max_decode_wait_s,
    )


def load_profiles(path: Path) -> tuple[Profile, ...]:
    """Return the profiles of a file, or of every JSON file of a folder; there may be none.

    Raises:
        ConfigurationError: A file is no profile.
    """
    return tuple(parse_profile(file.read_text(), name=str(file)) for file in profile_paths(path))
