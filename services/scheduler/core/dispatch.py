"""A device's next plan: what the policy sees of it, and what its plan becomes.

`run` asks for each UNet worker in turn: `view_device` gathers, the policy decides, `_carry_out`
notes and sends.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from services.scheduler.core.assignments import Assignments
from services.scheduler.core.blame import blamed_on
from services.scheduler.core.cluster import Cluster
from services.scheduler.core.outbox import Outbox
from services.scheduler.core.state import (
    AT_UNET,
    BatchKey,
    Request,
    SlotInFlight,
    Stage,
    UnetWorker,
    Usage,
    VaeWorker,
)
from services.scheduler.planning.policy import Decode, DeviceView, Grant, Plan, Policy
from shared import messages


@dataclass(slots=True, kw_only=True)
class Queues:
    """Requests by where they are, sorted once for all devices."""

    residents: dict[str, list[Request]] = field(default_factory=dict)
    """By UNet worker."""
    pending: dict[str, list[Request]] = field(default_factory=dict)
    """With latents that wait for a VAE worker, by model."""
    num_waiting: Counter[BatchKey] = field(default_factory=Counter)
    """For admission."""
    num_workers: Counter[str] = field(default_factory=Counter)
    """UNet workers that may be given something, by model."""


def sort_requests(cluster: Cluster) -> Queues:
    """Return the queues that all devices' views are made from."""
    queues = Queues()
    for request in cluster.requests.values():
        if request.stage is Stage.WAITING:
            queues.num_waiting[request.batch_key] += 1
        elif request.stage in AT_UNET:
            queues.residents.setdefault(request.unet, []).append(request)
        elif request.stage is Stage.LATENTS:
            queues.pending.setdefault(request.batch_key.model, []).append(request)
    queues.num_workers.update(
        unet.info.model_id for unet in cluster.unets.values() if unet.is_usable
    )
    return queues


def view_device(cluster: Cluster, unet: UnetWorker, queues: Queues, now: float) -> DeviceView:
    """Return what a policy decides on: the worker's requests and the decodes on its device."""
    model = unet.info.model_id
    residents = queues.residents.get(unet.info.incarnation, [])
    beside = cluster.vaes_on(unet.info.device_group)
    decodes = [
        _decode(cluster.requests[request_id], vae, unet, is_assigned=True)
        for vae in beside
        for request_id in vae.decodes
    ]
    own = next((vae for vae in beside if vae.info.model_id == model and not vae.is_suspect), None)
    if own:
        later = [*queues.pending.get(model, ()), *(r for r in residents if r.has_latents_soon)]
        decodes += [_decode(request, own, unet, is_assigned=False) for request in later]
    num_workers = max(queues.num_workers[model], 1)
    return DeviceView(
        unet=unet,
        requests=residents,
        decodes=decodes,
        waiting={
            key: count / num_workers
            for key, count in queues.num_waiting.items()
            if key.model == model
        },
        now=now,
    )


def _decode(request: Request, vae: VaeWorker, unet: UnetWorker, *, is_assigned: bool) -> Decode:
    num_chunks = vae.num_chunks(request.batch_key)
    is_own = request.batch_key.model == unet.info.model_id
    timing = unet.durations.decode(request.batch_key.size) if is_own else None
    decode_ms = sum(timing.chunk_ms) if timing else vae.info.decode_ms
    return Decode(
        request=request,
        num_chunks=num_chunks,
        chunk_ms=decode_ms / num_chunks,
        is_assigned=is_assigned,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """What follows from the state, over a cluster."""

    cluster: Cluster
    policy: Policy
    assignments: Assignments
    outbox: Outbox

    def run(self, now: float, *, resting: frozenset[str] = frozenset()) -> None:
        """Admit, assign, plan and grant whatever can be.

        resting: device groups that are to compute nothing more for now.

        Raises:
            BlamedError: It names the request or worker by which it failed.
        """
        self.assignments.admit_waiting(now)
        self.assignments.assign_decodes(now)
        queues = sort_requests(self.cluster)
        for unet in self.cluster.unets.values():
            if unet.info.device_group not in resting and not unet.is_suspect:
                with blamed_on(unet):
                    has_sent = True
                    while has_sent:
                        view = view_device(self.cluster, unet, queues, now)
                        has_sent = self._carry_out(unet, self.policy.plan(view), now)
        self._grant_off_device(now)

    def adjust_threshold(self, unet: UnetWorker, now: float) -> None:
        """Let the threshold move, now that a slot is over."""
        view = view_device(self.cluster, unet, sort_requests(self.cluster), now)
        self.cluster.set_threshold(unet, self.policy.adjust(view))

    def _carry_out(self, unet: UnetWorker, plan: Plan, now: float) -> bool:
        """Note and send what a plan says; return whether a slot was in it."""
        cluster, slot_seq = self.cluster, self.cluster.next_seq
        if plan.outlook:
            cluster.set_outlook(unet, plan.outlook)
        if plan.usage:
            ms, alone_ms = plan.usage
            seq = slot_seq if plan.rows else 0
            cluster.spend(unet, Usage(seq=seq, ms=ms, alone_ms=alone_ms))
        if not unet.slots and not self._has_gap(unet):
            cluster.note_rest(unet, now)
        for grant in plan.grants:
            beside_seq = grant.beside_seq
            if grant.is_bound and plan.rows:
                beside_seq = slot_seq
            elif grant.is_gap and unet.slots:
                # It begins behind the slots in flight; what a slot's header says first after
                # its end is the next number.
                beside_seq = unet.slots[-1].seq + 1
            self._grant(grant, now, beside_seq=beside_seq, pool=unet.info.pool)
            if grant.beside_seq:
                cluster.lengthen(unet, grant.beside_seq, chunks=grant.chunks, ms=grant.extra_ms)
        if plan.rows:
            self._send_slot(unet, plan, now)
        elif not unet.slots and not plan.grants and not self._has_gap(unet):
            cluster.forget_usage(unet)
        return bool(plan.rows)

    def _has_gap(self, unet: UnetWorker) -> bool:
        """Return whether a gap on the worker's device may not be over yet."""
        return any(request.has_gap for request in self.cluster.decodes_on(unet.info.device_group))

    def _send_slot(self, unet: UnetWorker, plan: Plan, now: float) -> None:
        requests = self.cluster.requests
        key = requests[plan.rows[0].request_id].batch_key
        slot = SlotInFlight(
            seq=self.cluster.next_seq,
            sent_at=now,
            rows=plan.rows,
            key=key,
            kind=plan.kind,
            shape=plan.shape,
            num_rows=sum(requests[row.request_id].rows - row.skip for row in plan.rows),
            chunks=sum(grant.chunks for grant in plan.grants if grant.is_bound),
        )
        turn_ms = unet.durations.alone(key.size, max(slot.num_rows, 1)).ms
        self.cluster.send_slot(unet, slot, turn_ms)
        message = messages.DenoiseSlot(
            epoch=self.cluster.epoch,
            seq=slot.seq,
            kind="beside" if plan.kind and plan.kind.chunks else "alone",
            threads=plan.threads,
            shape=plan.shape,
            rows=plan.rows,
        )
        self.outbox.send(unet.info.incarnation, "work", message)

    def _grant_off_device(self, now: float) -> None:
        """Grant all chunks at once where nobody denoises on the VAE worker's device."""
        busy_groups = self.assignments.busy_groups()
        for vae in self.cluster.vaes.values():
            if vae.info.device_group in busy_groups:
                continue
            for request_id in vae.decodes:
                request = self.cluster.requests[request_id]
                missing = vae.num_chunks(request.batch_key) - request.granted_chunks
                if missing > 0:
                    grant = Grant(request_id=request_id, chunks=missing, threads=vae.info.threads)
                    self._grant(grant, now, beside_seq=0, pool="")

    def _grant(self, grant: Grant, now: float, *, beside_seq: int, pool: str) -> None:
        request = self.cluster.requests[grant.request_id]
        self.cluster.grant(request, grant.chunks, is_gap=grant.is_gap, now=now)
        message = messages.GrantChunks(
            epoch=self.cluster.epoch,
            request_id=grant.request_id,
            attempt=request.attempt,
            chunks=grant.chunks,
            threads=grant.threads,
            beside_seq=beside_seq,
            pool=pool,
        )
        self.outbox.send(request.vae, "work", message)
