"""Starts the scheduler: `python -m services.scheduler`."""

from __future__ import annotations

from services.scheduler.service import SchedulerService
from shared.service_main import run_service
from shared.settings import SchedulerSettings

if __name__ == "__main__":
    run_service("scheduler", SchedulerSettings, SchedulerService)
