"""Workers of one model's name serve one model: another of that name is told to end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis
from scheduler_world import World, make_worker

from services.scheduler.commands import Send
from services.scheduler.fleet import other_model
from shared.errors import ConfigurationError
from shared.messages import RefuseWorker, WorkerInfo, WorkerRegistered
from shared.settings import WorkerSettings
from shared.watchdog import Watchdog
from shared.worker import WorkerLink

UNET = WorkerInfo(
    worker_id="unet-0",
    incarnation="unet-0-1",
    kind="unet",
    device_group="g",
    host="h",
    device="cpu",
    dtype="float32",
    threads=1,
    max_requests=8,
    model_id="m",
    model_digest="aa",
)


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, False),
        ({"model_digest": "bb"}, True),
        ({"model_digest": "bb", "kind": "vae"}, True),
        ({"model_digest": "bb", "model_id": "n"}, False),
        ({"model_digest": ""}, False),
    ],
)
def test_another_model_of_one_name_is_refused(changes: dict[str, Any], is_refused: bool) -> None:
    other = replace(UNET, worker_id="w-1", incarnation="w-1-1", **changes)
    reason = other_model(other, [UNET])
    assert bool(reason) == is_refused
    assert ("w-1" in reason and "unet-0" in reason) == is_refused


async def test_a_refused_worker_ends_with_the_reason(redis: Redis) -> None:
    link = WorkerLink(redis, "w-1", WorkerSettings(), Watchdog())
    with pytest.raises(ConfigurationError, match="another model"):
        link._note(RefuseWorker(epoch=1, reason="another model"))


def test_the_scheduler_refuses_it_and_goes_on_without_it() -> None:
    world = World()
    for kind, worker_id, digest in (("unet", "u", "aa"), ("vae", "v", "aa"), ("unet", "x", "bb")):
        info = replace(make_worker(kind, worker_id, f"{worker_id}-1"), model_digest=digest)
        world.feed(WorkerRegistered(worker=info))
    assert set(world.core.unets) == {"u-1"}
    assert set(world.core.vaes) == {"v-1"}
    sent = [
        command
        for _, _, commands in world.log
        for command in commands
        if isinstance(command, Send) and isinstance(command.message, RefuseWorker)
    ]
    assert [command.incarnation for command in sent] == ["x-1"]
