"""A scheduler that serves by a contender's policy: `python -m bench.scheduler NAME`."""

from __future__ import annotations

import sys

from bench.contenders import POLICIES
from services.scheduler.configuration import policy_options
from services.scheduler.service import SchedulerService
from shared.service_main import run_service
from shared.settings import SchedulerSettings


def main(name: str) -> None:
    """Serve until stopped.

    Raises:
        KeyError: There is no policy of that name.
    """
    make = POLICIES[name]
    run_service(
        "scheduler",
        SchedulerSettings,
        lambda redis, settings: SchedulerService(
            redis, settings, policy_name=name, policy=make(policy_options(settings))
        ),
    )


if __name__ == "__main__":
    main(sys.argv[1])
