"""Every key and stream in Redis: what it holds, how long it lives, who owns it.

Open work is never trimmed: an entry leaves `REQUESTS` when its request is final, `SCHEDULER` when
it has been handled, a worker's streams when it has been handled or the worker is gone.
"""

from __future__ import annotations

from typing import Final

REQUESTS: Final = "sd:requests"
"""Stream of `GenerateImage`. Written by the gateway, read by the scheduler from its beginning at
every start; an entry is deleted by the call that makes its request final. Its length is therefore
the number of open requests. An entry's id is the instant of its submission on the store's clock."""

SCHEDULER: Final = "sd:scheduler"
"""Stream of messages to the scheduler. Deleted once handled; emptied by a new epoch, which asks the
workers for their state instead."""

EVENTS: Final = "sd:events"
"""Stream of `RequestsProgressed` and `RequestFinished` for the gateways. A notice board, not work:
the records hold the truth, so it is trimmed to some thousands."""

DEAD_LETTERS: Final = "sd:dead"
"""Stream of entries nobody could handle, and of keys that held what they can't, with the reason.
Kept for a person; bounded by number and by bytes (`lua/common.lua`)."""

EPOCH: Final = "sd:epoch"
"""Number of the latest scheduler's life; every write of an older one is refused. Never expires."""

SCHEDULER_LEASE: Final = "sd:scheduler:lease"
"""Token of the scheduler in charge, renewed while it lives; expires within seconds."""

STATUS: Final = "sd:status"
"""msgpack map of the scheduler's queue figures. Rewritten every second; expires within seconds."""

STATUS_TTL_S: Final = 5
"""With how long to live `STATUS` is written; what is left of it tells its age by the store's clock.
"""

WRITE_PROBE: Final = "sd:gateway:probe"
"""Nothing; written by gateways twice a second to see that Redis takes writes. Expires."""

PROFILES: Final = "sd:profiles"
"""Hash of profiles measured while serving, as JSON, by model, dtype, device and threads. Written by
the scheduler, read at its start; expires a week after the last."""

WORKERS: Final = "sd:workers"
"""Set of the incarnations that have registered; the scheduler removes the lost ones."""

FINISHED: Final = "sd:finished"
"""Sorted set of the final records' keys by the instant at which they expire: the oldest make room
where memory is short. Kept by the calls that make requests final."""

IMAGES: Final = "sd:images"
"""Sorted set of the stored images' keys by the instant at which they expire. Kept by the commit."""

IMAGE_SIZES: Final = "sd:images:sizes"
"""Hash of the stored images' sizes in bytes by key, with their sum under "total"."""

START_CHECK: Final = "sd:start-check"
"""Never there. A start deletes it, to learn whether the server lets it write."""


def job(job_id: str) -> str:
    """Hash of one HTTP request: its images' request ids. Expires with the records."""
    return f"sd:job:{job_id}"


def request(request_id: str) -> str:
    """Hash of one image's request: state, current attempt, and what came of it.

    Written by the gateway's submission, the scheduler's attempts, and the one call that makes it
    final; expires `record_ttl_s` after that, long after the image.
    """
    return f"sd:request:{request_id}"


def image(request_id: str, attempt: str) -> str:
    """The encoded image of one attempt. Written by the commit; expires, or is evicted for room."""
    return f"sd:image:{request_id}:{attempt}"


def latents(request_id: str, attempt: str) -> str:
    """Inline copy of finished latents. Written by the UNet worker; expires, or goes at commit."""
    return f"sd:latents:{request_id}:{attempt}"


def resume(request_id: str, attempt: str) -> str:
    """Hash of what a drained UNet worker has left of a request: `step`, and its `state`.

    Deleted by the worker that goes on with it; expires.
    """
    return f"sd:resume:{request_id}:{attempt}"


def worker(incarnation: str) -> str:
    """A worker's `WorkerInfo`. Its heartbeat rewrites it; its expiry means the worker is lost."""
    return f"sd:worker:{incarnation}"


def work(incarnation: str) -> str:
    """Stream of a worker's work, in order. No other worker reads it; deleted when it is lost."""
    return f"sd:worker:{incarnation}:work"


def control(incarnation: str) -> str:
    """Stream of a worker's control messages: applied at the next slot or chunk, before its work."""
    return f"sd:worker:{incarnation}:control"
