"""By when workers must have answered, and what becomes of what they have not.

Two rules, looked at on every tick. A worker that owes something and answers nothing at all for so
long is *suspect*: its work begins again elsewhere, and it gets nothing until it has announced what
it holds, which is asked of it now and then. Where a worker goes on answering, but not about one
thing, that thing was lost on the way: it alone begins again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.scheduler.core.cluster import Cluster
from services.scheduler.core.endings import Endings
from services.scheduler.core.outbox import Outbox
from services.scheduler.core.state import AT_UNET, BatchKey, Request, Stage, UnetWorker, VaeWorker
from services.scheduler.devices.drift import ALONE, CHUNKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an answer may take: a multiple of its prediction, and at least a floor."""

    factor: float = 20.0
    floor_s: float = 10.0
    first_use_s: float = 60.0
    """The floor for a size that a worker has not run yet, which may compile or warm up."""

    def allow_s(self, predicted_ms: float, *, is_warm: bool = True) -> float:
        """Return the seconds that an answer predicted to take so long may take."""
        floor_s = self.floor_s if is_warm else self.first_use_s
        return max(self.factor * predicted_ms / 1000, floor_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """What is owed when, over a cluster."""

    cluster: Cluster
    patience: Patience
    endings: Endings
    """What becomes of work that is taken from a worker."""
    outbox: Outbox

    def suspect(self, incarnation: str, reason: str, now: float) -> None:
        """Give all that a worker has to others, and ask it what it holds."""
        worker = self.cluster.worker(incarnation)
        if worker is None or worker.is_suspect:
            return
        self.cluster.suspect(worker)
        if isinstance(worker, UnetWorker):
            for request in self.cluster.held_by(incarnation):
                self.endings.restart(request, reason)
        else:
            for request_id in tuple(worker.decodes):
                self.endings.decode_elsewhere(self.cluster.requests[request_id], reason)
        self._probe(worker, now)

    def check(self, now: float) -> None:
        """End what nobody waits for any more, and take away what is overdue."""
        for request in list(self.cluster.requests.values()):
            if now > request.deadline_at:
                deadline_ms = request.request.deadline_ms
                self.endings.fail(
                    request,
                    code="deadline_exceeded",
                    reason=f"not done within deadline_ms={deadline_ms}",
                )
        at_unets: dict[str, list[Request]] = {name: [] for name in self.cluster.unets}
        for request in self.cluster.requests.values():
            if request.stage in AT_UNET and request.unet in at_unets:
                at_unets[request.unet].append(request)
        for name, unet in self.cluster.unets.items():
            self._check_unet(unet, at_unets[name], now)
        for vae in self.cluster.vaes.values():
            self._check_vae(vae, now)

    def _probe(self, worker: UnetWorker | VaeWorker, now: float) -> None:
        self.cluster.note_probe(worker, now)
        self.outbox.ask_what_is_held(worker.info.incarnation)

    def _probe_when_due(self, worker: UnetWorker | VaeWorker, now: float) -> None:
        if now > worker.probed_at + self.patience.floor_s:
            self._probe(worker, now)

    # --- UNet workers ---------------------------------------------------------------------------

    def _check_unet(self, unet: UnetWorker, held: Iterable[Request], now: float) -> None:
        if unet.is_suspect:
            self._probe_when_due(unet, now)
            return
        encoding = [request for request in held if request.stage is Stage.ENCODING]
        leaving = [request for request in held if request.awaits_latents]
        slot_s = self._slot_allowance_s(unet)
        allowance_s = max(slot_s, self.patience.allow_s(unet.profile.encode_ms))
        owed_since = [request.asked_at for request in encoding] + [
            slot.sent_at for slot in unet.slots
        ]
        if owed_since and now > max(min(owed_since), unet.answered_at) + allowance_s:
            self.suspect(unet.info.incarnation, "unet worker does not answer", now)
            return
        for request in encoding:
            # All that were sent before it may go first.
            if now > request.asked_at + allowance_s * (len(encoding) + 1):
                self.endings.restart(request, "admission not answered")
        for request in leaving:
            self._check_latents(request, now)

    def _slot_allowance_s(self, unet: UnetWorker) -> float:
        """Return what the slot that runs may take, and the prompts encoded ahead of it."""
        if not unet.slots:
            return 0.0
        slot = unet.slots[0]
        alone_ms = unet.durations.alone(slot.key.size, max(slot.num_rows, 1)).ms
        chunk_ms = slot.chunks * unet.durations.chunk_ms(slot.key.size)
        predicted_ms = (alone_ms + chunk_ms) * max(unet.drift.factor(ALONE), 1.0)
        return self.patience.allow_s(predicted_ms, is_warm=slot.key in unet.warm)

    def _check_latents(self, request: Request, now: float) -> None:
        """Restart a request whose latents don't come, though decodes ahead have made room."""
        model = request.batch_key.model
        decode_ms = [
            vae.info.decode_ms
            for vae in self.cluster.vaes.values()
            if vae.info.model_id == model and not vae.is_suspect
        ]
        if not decode_ms:
            self.cluster.expect_answer(request, now)
            return
        ahead = sum(
            other.batch_key.model == model and other.stage in {Stage.LATENTS, Stage.DECODING}
            for other in self.cluster.requests.values()
        )
        allowance_s = self.patience.allow_s((ahead + 1) * max(decode_ms))
        if now > request.asked_at + allowance_s:
            self.endings.restart(request, "latents not handed over")

    # --- VAE workers ----------------------------------------------------------------------------

    def _check_vae(self, vae: VaeWorker, now: float) -> None:
        if vae.is_suspect:
            self._probe_when_due(vae, now)
            return
        decodes = [self.cluster.requests[request_id] for request_id in vae.decodes]
        owed = [request for request in decodes if vae.owes(request)]
        if not owed:
            return
        allowance_s = max(self._decode_allowance_s(vae, request) for request in owed)
        if now > max(min(request.asked_at for request in owed), vae.answered_at) + allowance_s:
            self.suspect(vae.info.incarnation, "vae worker does not answer", now)
            return
        for request in owed:
            if now > request.asked_at + allowance_s * (len(decodes) + 1):
                self.endings.decode_elsewhere(request, "decode not answered")

    def _decode_allowance_s(self, vae: VaeWorker, request: Request) -> float:
        """Return what a decode may take, with the slot on its device that it may wait for."""
        key = request.batch_key
        predicted_ms = vae.info.decode_ms
        for unet in self.cluster.unets.values():
            if unet.info.device_group == vae.info.device_group:
                decode = (
                    unet.durations.decode(key.size) if unet.info.model_id == key.model else None
                )
                decode_ms = sum(decode.chunk_ms) if decode else predicted_ms
                predicted_ms = max(predicted_ms, decode_ms * unet.drift.factor(CHUNKS))
                if unet.slots:
                    slot = unet.slots[0]
                    predicted_ms += unet.durations.alone(slot.key.size, slot.num_rows).ms
        return self.patience.allow_s(predicted_ms, is_warm=self._is_warm(vae, key))

    def _is_warm(self, vae: VaeWorker, key: BatchKey) -> bool:
        """Return whether it has decoded that size, be it at its start."""
        return key in vae.warm or any(
            unet.info.model is not None
            and key == (key.model, unet.info.model.default_height, unet.info.model.default_width)
            for unet in self.cluster.unets.values()
            if unet.info.model_id == key.model
        )
