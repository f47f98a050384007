"""A device group on a real server that does at once what it is told, and commits small pictures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from image_parameters import PARAMETERS
from redis.asyncio import Redis

from bench.scheduler_load import EchoGroup
from services.scheduler.profile_file import parse_profile
from shared.messages import GenerateImage, ImageDecoded, WorkerInfo
from shared.records import Commit, JobRecord, Outcome, Records, RequestRecord, Retention
from shared.settings import SHIPPED_PROFILES, SchedulerSettings, WorkerSettings
from shared.watchdog import Watchdog
from shared.worker import WorkerLink

_PROFILE_FILE = SHIPPED_PROFILES / "assumed" / "a100-sd15.json"
PROFILE = parse_profile(_PROFILE_FILE.read_text())
SETTINGS = SchedulerSettings(recovery_s=0.3, profiles=_PROFILE_FILE)
"""Of a scheduler for them."""
_WORKER_SETTINGS = WorkerSettings(heartbeat_ttl_ms=3_000, drain_timeout_s=1.0)


def request(request_id: str, **changes: object) -> GenerateImage:
    """A request for what the echo workers serve."""
    parameters = replace(PARAMETERS, model=PROFILE.model_id, height=512, width=512)
    made = GenerateImage(
        request_id=request_id,
        job_id=f"job-{request_id}",
        owner="",
        priority=0,
        deadline_ms=0,
        submitted_at=0.0,
        parameters=parameters,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


async def submit(redis: Redis, *requests: GenerateImage) -> None:
    for each in requests:
        job = JobRecord(job_id=each.job_id, request_ids=(each.request_id,))
        await Records(redis).submit(job, [each], max_open=10_000)


async def until_final(redis: Redis, request_id: str, *, timeout_s: float = 20.0) -> RequestRecord:
    async with asyncio.timeout(timeout_s):
        while True:
            record = await Records(redis).read(request_id)
            if record and record.is_final:
                return record
            await asyncio.sleep(0.02)


@asynccontextmanager
async def echo_workers(
    redis: Redis, *, number: int = 0, image: bytes = b"picture"
) -> AsyncIterator[EchoGroup]:
    """Both workers of a group, registered and at work until left."""
    group = EchoGroup(number, PROFILE)
    links = []
    watchdog = Watchdog()
    async with asyncio.TaskGroup() as tasks:
        for info in (group.unet, group.vae):
            link = WorkerLink(redis, info.incarnation, _WORKER_SETTINGS, watchdog)
            links.append(link)
            tasks.create_task(link.run(info))
            tasks.create_task(_serve(redis, link, group, info, image))
        try:
            yield group
        finally:
            for link in links:
                link.stop()
            watchdog.close()


async def _serve(
    redis: Redis, link: WorkerLink, group: EchoGroup, info: WorkerInfo, image: bytes
) -> None:
    records = Records(redis, Retention(image_budget_bytes=1 << 30))
    while not link.is_stopping:
        await link.news()
        for lane in (link.control, link.work):
            while lane:
                for answer in group.answer(info.incarnation, lane.popleft()):
                    if isinstance(answer, ImageDecoded):
                        await records.commit(Commit(decoded=answer, image=image, outcome=_OUTCOME))
                    else:
                        link.post(answer)


_OUTCOME = Outcome(content_type="image/png", size_bytes=7, seed=1)
