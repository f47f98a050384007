"""What measured durations teach: the profile's drift, and chunks that took more than planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

from services.scheduler.drift import ALONE, BESIDE, CHUNKS
from services.scheduler.state import Request, UnetWorker
from shared.messages import ChunksDecoded, SlotDenoised

CERTAIN_OVERRUN = 1.1
"""Slots and chunks that take up to so many times what was planned are noise."""


def note_slot(unet: UnetWorker, event: SlotDenoised, requests: Mapping[str, Request]) -> None:
    """A slot's duration corrects its kind, by the rows that really ran."""
    slot = next((slot for slot in unet.slots if slot.seq == event.seq), None)
    if slot is None or slot.kind is None or slot.kind not in unet.profile.kinds(slot.key.size):
        return
    rows = 0
    for row in event.rows:
        request = requests.get(row.request_id)
        if request is None or request.attempt != row.attempt:
            return
        if row.has_run:
            rows += 1 if row.was_skipped else request.rows
    if not rows:
        return
    _charge_slot(unet, event)
    size, durations = slot.key.size, unet.durations
    kind = BESIDE if slot.chunks else ALONE
    if durations.has_beside(size, slot.shape.threads_beside):
        predicted_ms = durations.beside(size, rows, slot.chunks, 1.0, shape=slot.shape).ms
    else:
        predicted_ms = durations.alone(size, rows).ms
    unet.drift = unet.drift.after(
        kind,
        predicted_ms=predicted_ms * unet.drift.factor(kind),
        measured_ms=event.duration_ms,
    )


def _charge_slot(unet: UnetWorker, event: SlotDenoised) -> None:
    """A slot that certainly took longer, as one does that an overrun chunk ran into, owes that."""
    for spent in unet.ledger:
        if spent.seq == event.seq and event.duration_ms > CERTAIN_OVERRUN * spent.ms:
            spent.ms = event.duration_ms


def note_chunks(
    request: Request, event: ChunksDecoded, unets: Iterable[UnetWorker], now: float
) -> None:
    """A gap's duration corrects chunks'; what it took too long is owed by the next slots.

    It counts from the end of the slot ahead of it, so that what passes between the two is in it.
    """
    count = event.chunks_done - request.done_chunks
    if count <= 0 or event.duration_ms <= 0:
        return
    for unet in unets:
        is_its_own = unet.info.model_id == request.batch_key.model
        timing = unet.profile.decode(request.batch_key.size) if is_its_own else None
        if timing is None or not request.has_gap:
            continue
        predicted_ms = count * fmean(timing.chunk_ms) * unet.drift.factor(CHUNKS)
        measured_ms = max((now - unet.rests_since) * 1000, event.duration_ms)
        unet.rests_since = now
        unet.drift = unet.drift.after(CHUNKS, predicted_ms=predicted_ms, measured_ms=measured_ms)
        if measured_ms > CERTAIN_OVERRUN * predicted_ms and unet.ledger:
            unet.ledger[-1].ms += measured_ms - predicted_ms
