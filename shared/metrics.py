"""Every metric of the project, in one place.

Under `synerdiff up` the services share a directory (PROMETHEUS_MULTIPROC_DIR) and the gateway's
`/metrics` shows them all; in containers each service serves its own (`probe`).
"""

from __future__ import annotations

import os

from shared.metrics_files import reserve_files

reserve_files()  # before the library decides whether metrics are shared

from prometheus_client import (  # noqa: E402
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)

# gateway
HTTP_REQUESTS = Counter(
    "synerdiff_http_requests", "HTTP requests by route and status", ["method", "route", "status"]
)
HTTP_SECONDS = Histogram(
    "synerdiff_http_request_seconds", "Time to answer an HTTP request", ["route"], buckets=_SECONDS
)

# scheduler
REQUESTS = Gauge(
    "synerdiff_requests", "Open requests by state", ["state"], multiprocess_mode="mostrecent"
)
BACKLOG = Gauge(
    "synerdiff_backlog",
    "Open requests by the pool of workers that they wait for or are at: unet or vae",
    ["pool"],
    multiprocess_mode="mostrecent",
)
REQUESTS_FINISHED = Counter("synerdiff_requests_finished", "Requests with a final state", ["state"])
REQUEST_SECONDS = Histogram(
    "synerdiff_request_seconds", "From submission to the committed image", buckets=_SECONDS
)
SLOTS = Counter("synerdiff_slots", "Slots sent to UNet workers, by kind", ["kind"])
REDELIVERIES = Counter(
    "synerdiff_redeliveries", "Requests given a new attempt, by what made it necessary", ["reason"]
)
THRESHOLD = Gauge(
    "synerdiff_threshold",
    "The UNet's share of the speed it has alone that decodes leave it, by device",
    ["device_group"],
    multiprocess_mode="mostrecent",
)
PROFILE_COMPLETE = Gauge(
    "synerdiff_profile_complete",
    "Whether slots beside decode chunks are known, by device",
    ["device_group"],
    multiprocess_mode="mostrecent",
)
WORKERS = Gauge(
    "synerdiff_workers", "Registered workers by kind", ["kind"], multiprocess_mode="mostrecent"
)
PAIRS = Gauge(
    "synerdiff_worker_pairs",
    "Pairs of a UNet and a VAE worker by the transport that latents take between them",
    ["transport"],
    multiprocess_mode="mostrecent",
)
DEAD_LETTERS = Counter(
    "synerdiff_dead_letters",
    "Entries and keys that nobody could handle, by where they lay",
    ["stream"],
)
DEAD_LETTERS_KEPT = Gauge(
    "synerdiff_dead_letters_kept",
    "Of these, how many are kept for a person to look at",
    multiprocess_mode="mostrecent",
)
DEAD_LETTERS_BYTES = Gauge(
    "synerdiff_dead_letters_kept_bytes",
    "Memory that they take in Redis",
    multiprocess_mode="mostrecent",
)
EPOCH = Gauge("synerdiff_epoch", "The scheduler's epoch", multiprocess_mode="mostrecent")

# workers
STEP_SECONDS = Histogram(
    "synerdiff_step_seconds", "Time of a slot on the compute thread", buckets=_STEP_SECONDS
)
SLOT_ROWS = Histogram("synerdiff_slot_rows", "UNet rows of a slot", buckets=_ROWS)
FORWARDS = Counter("synerdiff_forwards", "Requests' forwards, by guidance", ["guidance"])
ENCODE_SECONDS = Histogram(
    "synerdiff_encode_seconds", "Time to admit a request: prompt and latents", buckets=_STEP_SECONDS
)
DECODE_SECONDS = Histogram(
    "synerdiff_decode_seconds",
    "Time of a whole decode on the compute thread",
    buckets=_STEP_SECONDS,
)
RESUMED = Counter("synerdiff_resumed", "Requests gone on with where a drained worker left them")
IMAGES_ENCODED = Counter("synerdiff_images_encoded", "Images encoded, by format", ["format"])
POOL_SLOTS = Gauge(
    "synerdiff_pool_slots", "Tensor pool slots by state", ["state"], multiprocess_mode="livesum"
)
TRANSFERS = Counter("synerdiff_transfers", "Latents taken over, by transport kind", ["transport"])
HANDLES_LOST = Counter("synerdiff_handles_lost", "Handles that could not be read")


def render_metrics() -> tuple[bytes, str]:
    """The metrics of all processes that share a directory, or else of this one; and their type."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY), CONTENT_TYPE_LATEST
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST
