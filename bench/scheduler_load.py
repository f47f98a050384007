"""What keeps a scheduler busy without any worker: views to plan, and workers that only echo."""

from __future__ import annotations

import random
from collections.abc import Iterable

from services.scheduler.policy import Decode, GroupView
from services.scheduler.profile import Profile
from services.scheduler.simulation.worker_info import unet_info, vae_info
from services.scheduler.state import Request, SlotInFlight, Stage, UnetWorker
from services.scheduler.threshold import Threshold
from shared import messages

MAX_REQUESTS = 2_048
"""Resident at a worker, so that nothing but the scheduler sets the pace."""


def make_request(
    number: int, profile: Profile, *, steps: int, guided: bool
) -> messages.GenerateImage:
    """A request of the profile's own size."""
    height, _, width = profile.slots[0].key.partition("x")
    return messages.GenerateImage(
        request_id=f"r{number}",
        job_id=f"r{number}",
        owner="",
        priority=0,
        deadline_ms=0,
        submitted_at=0.001 * number,
        parameters=messages.ImageParameters(
            prompt="",
            negative_prompt="",
            seed=0,
            height=int(height),
            width=int(width),
            num_inference_steps=steps,
            guidance_scale=5.0 if guided else 1.0,
            sampler="ddim",
            guidance_skip="balanced",
            output_format="png",
            output_compression=100,
            model=profile.model_id,
        ),
    )


def make_view(
    chance: random.Random, profile: Profile, num_active: int, num_decodes: int
) -> GroupView:
    """A device in full swing: a slot runs, every request is at some step, decodes at some chunk."""
    info = unet_info(profile, group="g")
    unet = UnetWorker(
        info=info, profile=profile, threshold=Threshold(value=chance.uniform(0.3, 0.95))
    )
    requests = []
    for number in range(num_active):
        steps = chance.randint(10, 40)
        request = Request(
            request=make_request(number, profile, steps=steps, guided=chance.random() < 0.8),  # noqa: PLR2004
            stage=Stage.DENOISING,
            attempt="1-1",
            unet=info.incarnation,
            num_forwards=steps,
        )
        request.is_guided = request.request.parameters.guidance_scale > 1
        request.next_step = request.done_step = chance.randrange(steps)
        request.skip_steps = chance.randrange(3)
        request.num_skipped = request.done_step // 4
        request.skip_error = chance.random()
        requests.append(request)
    decodes = []
    for number in range(num_decodes):
        request = Request(
            request=make_request(10_000 + number, profile, steps=20, guided=True),
            stage=Stage.DECODING,
            attempt="1-1",
            latents_at=100.0 - chance.random(),
        )
        decodes.append(
            Decode(request=request, num_chunks=8, chunk_ms=3.75, is_assigned=number < 2)  # noqa: PLR2004
        )
        request.granted_chunks = request.done_chunks = chance.randrange(8)
    size = requests[0].batch_key.size
    unet.slots.append(
        SlotInFlight(
            seq=1,
            sent_at=0.0,
            rows=(),
            key=requests[0].batch_key,
            kind=profile.alone_kind(size),
            num_rows=profile.knee(size),
        )
    )
    return GroupView(unet=unet, requests=requests, decodes=decodes, num_waiting=8.0, now=100.0)


class EchoGroup:
    """A device group that does everything it is told at once."""

    def __init__(self, number: int, profile: Profile) -> None:
        group = f"g{number}"
        self.unet = unet_info(profile, group=group, max_requests=MAX_REQUESTS)
        self.vae = vae_info(profile, group=group, number=0)
        self._held: dict[str, tuple[int, int]] = {}
        self._decodes: dict[str, int] = {}

    @property
    def incarnations(self) -> tuple[str, str]:
        """Its workers' names."""
        return self.unet.incarnation, self.vae.incarnation

    def first_messages(self) -> list[messages.Message]:
        """Both workers register."""
        return [messages.WorkerRegistered(worker=info) for info in (self.unet, self.vae)]

    @staticmethod
    def requests(profile: Profile, count: int) -> Iterable[messages.GenerateImage]:
        """A standing backlog."""
        return (make_request(i, profile, steps=8 + i % 30, guided=True) for i in range(count))

    def answer(self, incarnation: str, message: messages.Message) -> list[messages.Message]:
        """What the worker would say, at once."""
        match message:
            case messages.BeginEpoch(epoch=epoch) if incarnation == self.unet.incarnation:
                return [messages.WorkerAnnounced(incarnation=incarnation, epoch=epoch)]
            case messages.AdmitRequest(request_id=name, attempt=attempt):
                steps = message.parameters.num_inference_steps
                self._held[name] = (0, steps)
                return [
                    messages.RequestAdmitted(
                        incarnation=incarnation,
                        request_id=name,
                        attempt=attempt,
                        num_forwards=steps,
                        is_guided=True,
                    )
                ]
            case messages.DenoiseSlot():
                return self._denoise(message)
            case messages.DecodeLatents(request_id=name):
                self._decodes[name] = 0
            case messages.GrantChunks():
                return self._decode(message)
        return []

    def _denoise(self, slot: messages.DenoiseSlot) -> list[messages.Message]:
        reports = []
        finished: list[messages.Message] = []
        for row in slot.rows:
            step, steps = self._held[row.request_id]
            self._held[row.request_id] = (step + 1, steps)
            is_held = step + 1 < steps
            reports.append(
                messages.RowReport(
                    request_id=row.request_id,
                    attempt=row.attempt,
                    has_run=True,
                    next_step_index=step + 1 if is_held else -1,
                    was_skipped=row.skip,
                    can_skip=step % 3 > 0,
                    skip_steps=step % 3,
                )
            )
            if not is_held:
                finished.append(self._latents(row))
        done = messages.SlotDenoised(
            incarnation=self.unet.incarnation,
            epoch=slot.epoch,
            seq=slot.seq,
            duration_ms=30.0,
            rows=tuple(reports),
        )
        return [done, *finished]

    def _latents(self, row: messages.SlotRow) -> messages.LatentsFinished:
        handle = messages.TensorHandle(
            kind="shm",
            pool=self.unet.pool,
            owner=self.unet.incarnation,
            host=self.unet.host,
            slot=0,
            generation=1,
            shape=(1, 4, 64, 64),
            dtype="float16",
        )
        return messages.LatentsFinished(
            incarnation=self.unet.incarnation,
            request_id=row.request_id,
            attempt=row.attempt,
            handle=handle,
        )

    def _decode(self, grant: messages.GrantChunks) -> list[messages.Message]:
        name = grant.request_id
        self._decodes[name] += grant.chunks
        done: list[messages.Message] = [
            messages.ChunksDecoded(
                incarnation=self.vae.incarnation,
                request_id=name,
                attempt=grant.attempt,
                chunks_done=self._decodes[name],
                duration_ms=4.0 * grant.chunks,
            )
        ]
        if self._decodes[name] >= self.vae.num_chunks:
            done.append(
                messages.ImageDecoded(
                    incarnation=self.vae.incarnation,
                    request_id=name,
                    attempt=grant.attempt,
                    decode_ms=30.0,
                    transport="shm",
                )
            )
        return done
