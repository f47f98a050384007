"""What measured durations teach: the profile's drift, and chunks that took more than planned."""

from __future__ import annotations

from statistics import fmean

from services.scheduler.core.cluster import Cluster
from services.scheduler.core.state import Request, SlotInFlight, UnetWorker
from services.scheduler.devices.drift import ALONE, BESIDE, CHUNKS
from shared.messages import ChunksDecoded, SlotDenoised

CERTAIN_OVERRUN = 1.1
"""Slots and chunks that take up to so many times what was planned are noise."""


def learn_from_slot(cluster: Cluster, unet: UnetWorker, event: SlotDenoised) -> None:
    """Correct the durations of a slot's kind by what it took, for the rows that really ran."""
    slot = next((slot for slot in unet.slots if slot.seq == event.seq), None)
    if slot is None or slot.kind is None or slot.kind not in unet.durations.kinds(slot.key.size):
        return
    rows = _rows_run(cluster, event)
    if not rows:
        return
    _charge_overrun(cluster, unet, event)
    kind = BESIDE if slot.chunks else ALONE
    drift = unet.drift.after(
        kind,
        predicted_ms=_predict_ms(unet, slot, rows) * unet.drift.factor(kind),
        measured_ms=event.duration_ms,
    )
    cluster.set_drift(unet, drift)


def _rows_run(cluster: Cluster, event: SlotDenoised) -> int:
    """Return the rows of a slot that ran; 0 where that is not known of all of them."""
    rows = 0
    for row in event.rows:
        request = cluster.find(row.request_id, row.attempt)
        if request is None:
            return 0
        if row.has_run:
            rows += 1 if row.was_skipped else request.rows
    return rows


def _predict_ms(unet: UnetWorker, slot: SlotInFlight, rows: int) -> float:
    """Return what the profile says of a slot with so many rows."""
    size, durations = slot.key.size, unet.durations
    if durations.has_beside(size, slot.shape.threads_beside):
        return durations.beside(size, rows, slot.chunks, 1.0, shape=slot.shape).ms
    return durations.alone(size, rows).ms


def _charge_overrun(cluster: Cluster, unet: UnetWorker, event: SlotDenoised) -> None:
    """Let a slot that certainly took longer owe that, as one does that an overrun chunk hit."""
    for usage in unet.usage:
        if usage.seq == event.seq and event.duration_ms > CERTAIN_OVERRUN * usage.ms:
            cluster.charge(unet, event.seq, event.duration_ms)


def learn_from_chunks(cluster: Cluster, request: Request, event: ChunksDecoded, now: float) -> None:
    """Correct chunks' durations by a gap's; what it took too long is owed by the next slots.

    A gap counts from the end of the slot ahead of it, so that what passes between is in it.
    """
    count = event.chunks_done - request.done_chunks
    vae = cluster.vaes.get(event.incarnation)
    if vae is None or not request.has_gap or count <= 0 or event.duration_ms <= 0:
        return
    for unet in cluster.unets_on(vae.info.device_group):
        is_its_own = unet.info.model_id == request.batch_key.model
        timing = unet.durations.decode(request.batch_key.size) if is_its_own else None
        if timing is None:
            continue
        predicted_ms = count * fmean(timing.chunk_ms) * unet.drift.factor(CHUNKS)
        measured_ms = max((now - unet.rests_since) * 1000, event.duration_ms)
        drift = unet.drift.after(CHUNKS, predicted_ms=predicted_ms, measured_ms=measured_ms)
        cluster.set_drift(unet, drift)
        is_overrun = measured_ms > CERTAIN_OVERRUN * predicted_ms
        overrun_ms = measured_ms - predicted_ms if is_overrun else 0.0
        cluster.end_gap(unet, overrun_ms=overrun_ms, now=now)
