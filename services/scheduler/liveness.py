"""By when workers must have answered, and what becomes of what they have not.

Two rules, looked at on every tick. A worker that owes something and answers nothing at all for so
long is *suspect*: its work begins again elsewhere, and it gets nothing until it has announced what
it holds, which is asked of it now and then. Where a worker goes on answering, but not about one
thing, that thing was lost on the way: it alone begins again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.scheduler.drift import ALONE, CHUNKS
from services.scheduler.endings import Endings
from services.scheduler.outbox import Outbox
from services.scheduler.state import AT_UNET, BatchKey, Request, Stage, UnetWorker, VaeWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an answer may take: a multiple of its prediction, and at least a floor."""

    factor: float = 20.0
    floor_s: float = 10.0
    first_use_s: float = 60.0
    """The floor for a size that a worker has not run yet, which may compile or warm up."""

    def allow_s(self, predicted_ms: float, *, is_warm: bool = True) -> float:
        """So many seconds for what is predicted to take so long."""
        floor_s = self.floor_s if is_warm else self.first_use_s
        return max(self.factor * predicted_ms / 1000, floor_s)


class Liveness:
    """It shares the core's state.

    Args:
        requests, unets, vaes: The core's own.
        patience: How long answers may take.
        endings: What becomes of work that is taken from a worker.
        outbox: Where the messages go.
    """

    def __init__(
        self,
        requests: dict[str, Request],
        unets: dict[str, UnetWorker],
        vaes: dict[str, VaeWorker],
        *,
        patience: Patience,
        endings: Endings,
        outbox: Outbox,
    ) -> None:
        self._requests = requests
        self._unets = unets
        self._vaes = vaes
        self._patience = patience
        self._endings = endings
        self._outbox = outbox

    def note_answer(self, incarnation: str, now: float) -> None:
        """A worker has done something that it was asked for."""
        worker = self._unets.get(incarnation) or self._vaes.get(incarnation)
        if worker:
            worker.answered_at = now

    def trust(self, incarnation: str) -> None:
        """A worker has announced what it holds: there is nothing old left that it could do."""
        worker = self._unets.get(incarnation) or self._vaes.get(incarnation)
        if worker:
            worker.is_suspect = False

    def suspect(self, incarnation: str, reason: str, now: float) -> None:
        """Give all that a worker has to others, and ask it what it holds."""
        worker = self._unets.get(incarnation) or self._vaes.get(incarnation)
        if worker is None or worker.is_suspect:
            return
        worker.is_suspect = True
        if isinstance(worker, UnetWorker):
            worker.slots.clear()
            worker.ledger.clear()
            worker.outlook = None
            for request in list(self._requests.values()):
                if request.unet == incarnation and request.stage in AT_UNET:
                    self._endings.restart(request, reason)
        else:
            for request_id in tuple(worker.decodes):
                self._endings.decode_elsewhere(self._requests[request_id], reason)
        self._probe(worker, now)

    def check(self, now: float) -> None:
        """End what nobody waits for any more, and take away what is overdue."""
        for request in list(self._requests.values()):
            if now > request.deadline_at:
                deadline_ms = request.request.deadline_ms
                self._endings.fail(
                    request,
                    code="deadline_exceeded",
                    reason=f"not done within deadline_ms={deadline_ms}",
                )
        at_unets: dict[str, list[Request]] = {name: [] for name in self._unets}
        for request in self._requests.values():
            if request.stage in AT_UNET and request.unet in at_unets:
                at_unets[request.unet].append(request)
        for name, unet in self._unets.items():
            self._check_unet(unet, at_unets[name], now)
        for vae in self._vaes.values():
            self._check_vae(vae, now)

    def _probe(self, worker: UnetWorker | VaeWorker, now: float) -> None:
        worker.probed_at = now
        self._outbox.ask_what_is_held(worker.info.incarnation)

    def _probe_when_due(self, worker: UnetWorker | VaeWorker, now: float) -> None:
        if now > worker.probed_at + self._patience.floor_s:
            self._probe(worker, now)

    # --- UNet workers ---------------------------------------------------------------------------

    def _check_unet(self, unet: UnetWorker, held: Iterable[Request], now: float) -> None:
        if unet.is_suspect:
            self._probe_when_due(unet, now)
            return
        encoding = [one for one in held if one.stage is Stage.ENCODING]
        leaving = [one for one in held if one.awaits_latents]
        slot_s = self._slot_allowance_s(unet)
        allowance_s = max(slot_s, self._patience.allow_s(unet.profile.encode_ms))
        owed_since = [one.asked_at for one in encoding] + [slot.sent_at for slot in unet.slots]
        if owed_since and now > max(min(owed_since), unet.answered_at) + allowance_s:
            self.suspect(unet.info.incarnation, "unet worker does not answer", now)
            return
        for request in encoding:
            # All that were sent before it may go first.
            if now > request.asked_at + allowance_s * (len(encoding) + 1):
                self._endings.restart(request, "admission not answered")
        for request in leaving:
            self._check_latents(request, now)

    def _slot_allowance_s(self, unet: UnetWorker) -> float:
        """For the slot that runs, and the prompts that are encoded ahead of it."""
        if not unet.slots:
            return 0.0
        slot = unet.slots[0]
        alone_ms = unet.durations.alone(slot.key.size, max(slot.num_rows, 1)).ms
        chunk_ms = slot.chunks * unet.durations.chunk_ms(slot.key.size)
        predicted_ms = (alone_ms + chunk_ms) * max(unet.drift.factor(ALONE), 1.0)
        return self._patience.allow_s(predicted_ms, is_warm=slot.key in unet.warm)

    def _check_latents(self, request: Request, now: float) -> None:
        """Latents wait for room in the pool, which the decodes ahead of them make."""
        model = request.batch_key.model
        decode_ms = [
            vae.info.decode_ms
            for vae in self._vaes.values()
            if vae.info.model_id == model and not vae.is_suspect
        ]
        if not decode_ms:
            request.asked_at = now
            return
        ahead = sum(
            one.batch_key.model == model and one.stage in {Stage.LATENTS, Stage.DECODING}
            for one in self._requests.values()
        )
        allowance_s = self._patience.allow_s((ahead + 1) * max(decode_ms))
        if now > request.asked_at + allowance_s:
            self._endings.restart(request, "latents not handed over")

    # --- VAE workers ----------------------------------------------------------------------------

    def _check_vae(self, vae: VaeWorker, now: float) -> None:
        if vae.is_suspect:
            self._probe_when_due(vae, now)
            return
        decodes = [self._requests[request_id] for request_id in vae.decodes]
        owed = [one for one in decodes if vae.owes(one)]
        if not owed:
            return
        allowance_s = max(self._decode_allowance_s(vae, one) for one in owed)
        if now > max(min(one.asked_at for one in owed), vae.answered_at) + allowance_s:
            self.suspect(vae.info.incarnation, "vae worker does not answer", now)
            return
        for request in owed:
            if now > request.asked_at + allowance_s * (len(decodes) + 1):
                self._endings.decode_elsewhere(request, "decode not answered")

    def _decode_allowance_s(self, vae: VaeWorker, request: Request) -> float:
        """For a whole decode, and the slot on its device that it may have to wait for."""
        key = request.batch_key
        predicted_ms = vae.info.decode_ms
        for unet in self._unets.values():
            if unet.info.device_group == vae.info.device_group:
                decode = unet.profile.decode(key.size) if unet.info.model_id == key.model else None
                decode_ms = sum(decode.chunk_ms) if decode else predicted_ms
                predicted_ms = max(predicted_ms, decode_ms * unet.drift.factor(CHUNKS))
                if unet.slots:
                    slot = unet.slots[0]
                    predicted_ms += unet.durations.alone(slot.key.size, slot.num_rows).ms
        return self._patience.allow_s(predicted_ms, is_warm=self._is_warm(vae, key))

    def _is_warm(self, vae: VaeWorker, key: BatchKey) -> bool:
        """Whether it has decoded that size, or did so at its start."""
        return key in vae.warm or any(
            unet.info.model is not None
            and key == (key.model, unet.info.model.default_height, unet.info.model.default_width)
            for unet in self._unets.values()
            if unet.info.model_id == key.model
        )
