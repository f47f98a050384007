"""Starts the gateway: `python -m services.gateway`."""

from __future__ import annotations

from services.gateway.service import GatewayService
from shared.service_main import run_service
from shared.settings import GatewaySettings

if __name__ == "__main__":
    run_service("gateway", GatewaySettings, GatewayService, is_patient=False)
