"""What follows from the state: admissions, decode assignments, slots and grants.

Runs after every event. Places are chosen by `placement`, slots and grants by the policy; here they
become messages, and the state notes what is on its way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from math import inf

from services.scheduler.commands import BeginAttempt
from services.scheduler.outbox import Outbox
from services.scheduler.packing import by_fair_share, by_urgency
from services.scheduler.placement import (
    choose_unet,
    choose_vae,
    has_room,
    loads,
    soonest_finish_ms,
    transport_of,
)
from services.scheduler.policy import Decode, Grant, GroupView, Plan, Policy
from services.scheduler.state import (
    AT_UNET,
    Request,
    SlotInFlight,
    Spent,
    Stage,
    UnetWorker,
    VaeWorker,
)
from shared import keys, messages


@dataclass(slots=True, kw_only=True)
class Queues:
    """Requests by where they are. residents: by UNet worker. pending, num_waiting: by model."""

    residents: dict[str, list[Request]] = field(default_factory=dict)
    pending: dict[str, list[Request]] = field(default_factory=dict)
    num_waiting: Counter[str] = field(default_factory=Counter)


class Dispatch:
    """The forward half of the core; it shares the core's state.

    Args:
        requests, unets, vaes: The core's own.
        policy: Decides slots and grants.
        outbox: Where the messages go.
    """

    def __init__(
        self,
        requests: dict[str, Request],
        unets: dict[str, UnetWorker],
        vaes: dict[str, VaeWorker],
        *,
        policy: Policy,
        outbox: Outbox,
    ) -> None:
        self._requests = requests
        self._unets = unets
        self._vaes = vaes
        self._policy = policy
        self._outbox = outbox
        self._next_seq = outbox.epoch
        self._next_attempt = 1
        self.subject: Request | UnetWorker | None = None
        """What it was about last, to know what is to blame where it fails."""

    def run(self, now: float, *, resting: frozenset[str] = frozenset()) -> None:
        """Admit, assign, plan and grant whatever can be.

        resting: device groups that are to compute nothing more for now.
        """
        self.subject = None
        self._admit_waiting(now)
        self._assign_decodes(now)
        self.subject = None
        queues = self._sort()
        for unet in self._unets.values():
            if unet.info.device_group not in resting and not unet.is_suspect:
                self.subject = unet
                self._plan(unet, queues, now)
        self.subject = None
        self._grant_off_device(now)

    def waiting(self, now: float, models: Collection[str] | None = None) -> list[Request]:
        """Requests at no worker, the next to be admitted first. models: only those of these."""
        return by_fair_share(
            (
                one
                for one in self._requests.values()
                if one.stage is Stage.WAITING and (models is None or one.batch_key.model in models)
            ),
            (one for one in self._requests.values() if one.stage in AT_UNET),
            now,
        )

    def find_guilty(self, unet: UnetWorker, now: float) -> Request | None:
        """The request that planning for a worker fails by; None if it holds none.

        One that fails it alone, else one without which it succeeds, else the newest.
        """
        view = self._view(unet, self._sort(), now)
        members = [*view.requests, *(decode.request for decode in view.decodes)]
        members.reverse()
        for suspected in members:
            if not self._can_plan(view, [suspected]):
                return suspected
        for suspected in members:
            if self._can_plan(view, [one for one in members if one is not suspected]):
                return suspected
        return members[0] if members else None

    def _can_plan(self, view: GroupView, requests: Collection[Request]) -> bool:
        """Whether there is a plan for these alone."""
        names = {request.request_id for request in requests}
        part = replace(
            view,
            requests=[one for one in view.requests if one.request_id in names],
            decodes=[one for one in view.decodes if one.request.request_id in names],
        )
        try:
            self._policy.plan(part)
        except Exception:  # noqa: BLE001  it is asked for whether there is any
            return False
        return True

    def refuse_hopeless(self, request: Request, now: float) -> bool:
        """Fail a new request whose deadline nobody could keep, even with nobody else there."""
        if request.deadline_at == inf:
            return False
        soonest_at = now + soonest_finish_ms(request, self._unets.values()) / 1000
        if soonest_at <= request.deadline_at:
            return False
        reason = (
            f"deadline_ms is {request.request.deadline_ms}, but the picture takes at least "
            f"{(soonest_at - request.request.submitted_at) * 1000:.0f} ms"
        )
        self._outbox.fail(request.request_id, code="deadline_unmeetable", reason=reason)
        return True

    def adjust_threshold(self, unet: UnetWorker, now: float) -> None:
        """A slot is over: the threshold may move."""
        unet.threshold = self._policy.adjust(self._view(unet, self._sort(), now))

    # --- admission ------------------------------------------------------------------------------

    def _admit_waiting(self, now: float) -> None:
        models = {
            one.batch_key.model for one in self._requests.values() if one.stage is Stage.WAITING
        }
        if not models:
            return
        factor = self._policy.admission_factor
        held = loads(self._requests.values(), self._unets)
        models &= {
            unet.info.model_id
            for name, unet in self._unets.items()
            if has_room(unet, held[name], factor)
        }
        # Thousands may wait, so they are put in order only where there is room for one.
        for request in self.waiting(now, models) if models else ():
            self.subject = request
            if request.batch_key.model not in models:
                continue
            name = choose_unet(request, self._unets, held, factor=factor)
            if name is not None:
                self._admit(request, name, now)
                held[name].add(request, self._unets[name])
                continue
            models.remove(request.batch_key.model)
            if not models:
                return

    def _admit(self, request: Request, unet: str, now: float) -> None:
        """Begin an attempt, or go on with the one that a drained worker has handed back."""
        request.move_to(Stage.ENCODING)
        request.unet = unet
        request.asked_at = now
        if not request.attempt:
            request.attempt = f"{self._outbox.epoch}-{self._next_attempt}"
            request.num_attempts += 1
            self._next_attempt += 1
            self._outbox.add(BeginAttempt(request_id=request.request_id, attempt=request.attempt))
        admit = messages.AdmitRequest(
            epoch=self._outbox.epoch,
            request_id=request.request_id,
            attempt=request.attempt,
            parameters=request.request.parameters,
            resume_step=request.done_step,
        )
        self._outbox.send(unet, "control", admit)

    # --- decodes --------------------------------------------------------------------------------

    def _busy_groups(self) -> frozenset[str]:
        """Devices on which a UNet worker is planned for, and with it the decodes there."""
        return frozenset(
            unet.info.device_group for unet in self._unets.values() if not unet.is_suspect
        )

    def _assign_decodes(self, now: float) -> None:
        finished = [one for one in self._requests.values() if one.stage is Stage.LATENTS]
        busy_groups = self._busy_groups()
        for request in by_urgency(finished, now):
            self.subject = request
            name = choose_vae(request, self._vaes, self._unets, busy_groups)
            if name is not None:
                self._assign(request, self._vaes[name])

    def _assign(self, request: Request, vae: VaeWorker) -> None:
        assert request.latents is not None
        request.move_to(Stage.DECODING)
        request.forget_decode()
        request.vae = vae.info.incarnation
        request.num_decodes += 1
        vae.decodes.append(request.request_id)
        decode = messages.DecodeLatents(
            epoch=self._outbox.epoch,
            request_id=request.request_id,
            attempt=request.attempt,
            handle=request.latents.handle,
            transport=transport_of(request.latents, vae, self._unets),
            parameters=request.request.parameters,
            skipped_steps=request.latents.skipped_steps,
            warnings=request.warnings,
            release_to=keys.control(request.latents.handle.owner),
        )
        self._outbox.send(request.vae, "work", decode)

    def _grant_off_device(self, now: float) -> None:
        busy_groups = self._busy_groups()
        for vae in self._vaes.values():
            if vae.info.device_group in busy_groups:
                continue
            for request_id in vae.decodes:
                request = self._requests[request_id]
                missing = vae.num_chunks(request.batch_key) - request.granted_chunks
                if missing > 0:
                    grant = Grant(request_id=request_id, chunks=missing, threads=vae.info.threads)
                    self._grant(grant, now, beside_seq=0, pool="")

    # --- slots ----------------------------------------------------------------------------------

    def _sort(self) -> Queues:
        queues = Queues()
        for request in self._requests.values():
            if request.stage is Stage.WAITING:
                queues.num_waiting[request.batch_key.model] += 1
            elif request.stage in AT_UNET:
                queues.residents.setdefault(request.unet, []).append(request)
            elif request.stage is Stage.LATENTS:
                queues.pending.setdefault(request.batch_key.model, []).append(request)
        return queues

    def _plan(self, unet: UnetWorker, queues: Queues, now: float) -> None:
        while True:
            plan = self._policy.plan(self._view(unet, queues, now))
            self._carry_out(unet, plan, now)
            if not plan.rows:
                return

    def _carry_out(self, unet: UnetWorker, plan: Plan, now: float) -> None:
        if plan.outlook:
            unet.outlook = plan.outlook
        next_seq = self._next_seq + 1
        if plan.spends:
            ms, alone_ms = plan.spends
            unet.ledger.append(Spent(seq=next_seq if plan.rows else 0, ms=ms, alone_ms=alone_ms))
        last_seq = unet.slots[-1].seq if unet.slots else 0
        if not unet.slots and not self._has_gap(unet):
            unet.rests_since = now
        for grant in plan.grants:
            # A gap begins behind the slots in flight; what a slot's header says first after
            # its end is the next number.
            after = last_seq + 1 if grant.is_gap and last_seq else grant.beside_seq
            beside_seq = next_seq if grant.is_bound and plan.rows else after
            self._grant(grant, now, beside_seq=beside_seq, pool=unet.info.pool)
            if grant.beside_seq:
                _lengthen(unet, grant)
        if plan.rows:
            self._send_slot(unet, plan, now)
        elif not unet.slots and not plan.grants and not self._has_gap(unet):
            # The device rests: what was spent before is spent.
            unet.ledger.clear()

    def _has_gap(self, unet: UnetWorker) -> bool:
        """Whether a gap on the worker's device may not be over yet."""
        return any(
            self._requests[name].has_gap
            for vae in self._vaes.values()
            if vae.info.device_group == unet.info.device_group
            for name in vae.decodes
        )

    def _view(self, unet: UnetWorker, queues: Queues, now: float) -> GroupView:
        group, model = unet.info.device_group, unet.info.model_id
        residents = queues.residents.get(unet.info.incarnation, [])
        sharers = sum(
            other.info.model_id == model and other.is_usable for other in self._unets.values()
        )
        beside = [vae for vae in self._vaes.values() if vae.info.device_group == group]
        decodes = [
            _decode(self._requests[request_id], vae, unet, is_assigned=True)
            for vae in beside
            for request_id in vae.decodes
        ]
        own = next(
            (vae for vae in beside if vae.info.model_id == model and not vae.is_suspect), None
        )
        if own:
            pending = queues.pending.get(model, ())
            later = [*pending, *(one for one in residents if one.has_latents_soon)]
            decodes += [_decode(one, own, unet, is_assigned=False) for one in later]
        return GroupView(
            unet=unet,
            requests=residents,
            decodes=decodes,
            num_waiting=queues.num_waiting[model] / max(sharers, 1),
            now=now,
        )

    def _send_slot(self, unet: UnetWorker, plan: Plan, now: float) -> None:
        self._next_seq += 1
        unet.num_slots += 1
        key = self._requests[plan.rows[0].request_id].batch_key
        rows = sum(self._requests[row.request_id].rows - row.skip for row in plan.rows)
        unet.slots.append(
            SlotInFlight(
                seq=self._next_seq,
                sent_at=now,
                rows=plan.rows,
                key=key,
                kind=plan.kind,
                shape=plan.shape,
                num_rows=rows,
                chunks=sum(grant.chunks for grant in plan.grants if grant.is_bound),
            )
        )
        unet.turns[key] = unet.num_slots
        for row in plan.rows:
            request = self._requests[row.request_id]
            if not row.skip:
                request.last_full = request.next_step
            request.next_step += 1
            request.slots_in_flight += 1
        slot = messages.DenoiseSlot(
            epoch=self._outbox.epoch,
            seq=self._next_seq,
            kind="beside" if plan.kind and plan.kind.chunks else "alone",
            threads=plan.threads,
            shape=plan.shape,
            rows=plan.rows,
        )
        self._outbox.send(unet.info.incarnation, "work", slot)

    def _grant(self, grant: Grant, now: float, *, beside_seq: int, pool: str) -> None:
        request = self._requests[grant.request_id]
        if request.granted_chunks <= request.done_chunks:
            request.asked_at = now
        request.granted_chunks += grant.chunks
        request.has_gap = grant.is_gap
        message = messages.GrantChunks(
            epoch=self._outbox.epoch,
            request_id=grant.request_id,
            attempt=request.attempt,
            chunks=grant.chunks,
            threads=grant.threads,
            beside_seq=beside_seq,
            pool=pool,
        )
        self._outbox.send(request.vae, "work", message)


def _lengthen(unet: UnetWorker, grant: Grant) -> None:
    """A slot in flight has more chunks beside it than it was sent with."""
    for slot in unet.slots:
        if slot.seq == grant.beside_seq:
            slot.chunks += grant.chunks
    for spent in unet.ledger:
        if spent.seq == grant.beside_seq:
            spent.ms += grant.extra_ms


def _decode(request: Request, vae: VaeWorker, unet: UnetWorker, *, is_assigned: bool) -> Decode:
    num_chunks = vae.num_chunks(request.batch_key)
    is_own = request.batch_key.model == unet.info.model_id
    timing = unet.profile.decode(request.batch_key.size) if is_own else None
    decode_ms = sum(timing.chunk_ms) if timing else vae.info.decode_ms
    return Decode(
        request=request,
        num_chunks=num_chunks,
        chunk_ms=decode_ms / num_chunks,
        is_assigned=is_assigned,
    )
