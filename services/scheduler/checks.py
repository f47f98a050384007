"""What an event may hold: the ranges that everything behind the door relies on.

The gateway's limits are narrower, and a worker's answers follow from what it was sent. What is
outside of these comes from a foreign writer, another version, or a fault of ours.
"""

from __future__ import annotations

from functools import singledispatch

from services.scheduler.events import Event, RequestRecovered
from shared import messages
from shared.errors import ProtocolError

MAX_SIDE = 1 << 16
MAX_COUNT = 1 << 20
"""Of steps, chunks, rows, threads."""
MAX_PRIORITY = 1_000
"""Beyond what ageing makes up for within a day."""
MAX_MS = 1e12
MAX_INSTANT = 1e12


def explain(error: Exception) -> str:
    """An error in words for a log line and for the client."""
    return str(error) if isinstance(error, ProtocolError) else repr(error)


@singledispatch
def check(event: Event) -> None:
    """Return if every number of the event is in range and everything is named.

    Raises:
        ProtocolError: Says what is not.
    """
    del event  # one without numbers


@check.register
def _(event: RequestRecovered) -> None:
    check(event.request)
    _within("num_attempts", event.num_attempts, 0, MAX_COUNT)
    _within("resume_step", event.resume_step, 0, MAX_COUNT)


@check.register
def _(event: messages.WorkerAnnounced) -> None:
    for held in event.held:
        _within("step_index", held.step_index, 0, MAX_COUNT)
        _within("num_forwards", held.num_forwards, 0, MAX_COUNT)
        _within("num_skipped", held.num_skipped, 0, MAX_COUNT)
        _within("last_full", held.last_full, -1, MAX_COUNT)


@check.register
def _(event: messages.RequestHandedBack) -> None:
    _within("step_index", event.step_index, 0, MAX_COUNT)


@check.register
def _(event: messages.RequestAdmitted) -> None:
    _within("num_forwards", event.num_forwards, 1, MAX_COUNT)
    _within("step_index", event.step_index, 0, event.num_forwards)
    _within("num_skipped", event.num_skipped, 0, event.num_forwards)


@check.register
def _(event: messages.SlotDenoised) -> None:
    _within("duration_ms", event.duration_ms, 0, MAX_MS)
    for row in event.rows:
        _within("next_step_index", row.next_step_index, -1, MAX_COUNT)
        _within("skip_steps", row.skip_steps, 0, MAX_COUNT)


@check.register
def _(event: messages.ChunksDecoded) -> None:
    _within("chunks_done", event.chunks_done, 0, MAX_COUNT)
    _within("num_chunks", event.num_chunks, 0, MAX_COUNT)
    _within("duration_ms", event.duration_ms, 0, MAX_MS)


@check.register
def _(event: messages.SlotMeasured) -> None:
    _within("step_ms", event.step_ms, 0, MAX_MS)


@check.register
def _(event: messages.ChunksMeasured) -> None:
    for chunk_ms in event.chunk_ms:
        _within("chunk_ms", chunk_ms, 0, MAX_MS)


@check.register
def _(request: messages.GenerateImage) -> None:
    parameters = request.parameters
    _named("request_id", request.request_id)
    _named("model", parameters.model)
    _within("height", parameters.height, 1, MAX_SIDE)
    _within("width", parameters.width, 1, MAX_SIDE)
    _within("num_inference_steps", parameters.num_inference_steps, 1, MAX_COUNT)
    _within("guidance_scale", parameters.guidance_scale, -MAX_MS, MAX_MS)
    _within("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    _within("deadline_ms", request.deadline_ms, 0, MAX_MS)
    _within("submitted_at", request.submitted_at, 0, MAX_INSTANT)


@check.register
def _(event: messages.WorkerRegistered) -> None:
    worker = event.worker
    if worker.kind not in {"unet", "vae"}:
        raise ProtocolError(f"kind={worker.kind!r} is neither unet nor vae")
    for name in ("worker_id", "incarnation", "device_group", "device", "model_id"):
        _named(name, getattr(worker, name))
    _within("threads", worker.threads, 0, MAX_COUNT)
    _within("decode_ms", worker.decode_ms, 0, MAX_MS)
    _within("num_chunks", worker.num_chunks, 1, MAX_COUNT)
    if worker.kind == "vae":
        return
    _within("max_requests", worker.max_requests, 1, MAX_COUNT)
    _within("measured slot sizes", len(worker.step_ms), 1, MAX_COUNT)
    for rows, step_ms in worker.step_ms.items():
        _within("rows", rows, 1, MAX_COUNT)
        _within("step_ms", step_ms, 1e-6, MAX_MS)
    if worker.model:
        _within("default_height", worker.model.default_height, 1, MAX_SIDE)
        _within("default_width", worker.model.default_width, 1, MAX_SIDE)


def _named(what: str, name: str) -> None:
    if not name:
        raise ProtocolError(f"{what} is empty")


def _within(what: str, value: float, least: float, most: float) -> None:
    # Not a number is in no range.
    if not least <= value <= most:
        raise ProtocolError(f"{what}={value} is not from {least} to {most}")
