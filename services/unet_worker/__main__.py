"""Starts a UNet worker: `python -m services.unet_worker`."""

from __future__ import annotations

from services.unet_worker.service import UnetWorkerService
from shared.service_main import run_service
from shared.settings import UnetWorkerSettings

if __name__ == "__main__":
    run_service("unet_worker", UnetWorkerSettings, UnetWorkerService)
