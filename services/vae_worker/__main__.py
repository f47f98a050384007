"""Starts a VAE worker: `python -m services.vae_worker`."""

from __future__ import annotations

from services.vae_worker.service import VaeWorkerService
from shared.service_main import run_service
from shared.settings import VaeWorkerSettings

if __name__ == "__main__":
    run_service("vae_worker", VaeWorkerSettings, VaeWorkerService)
