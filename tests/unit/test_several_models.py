"""Models that share a device, or a service, have counts of their own."""

from __future__ import annotations

from dataclasses import replace

from scheduler_world import World, make_request, make_worker

from services.scheduler.core.dispatch import sort_requests, view_device
from services.scheduler.core.state import BatchKey
from services.scheduler.planning.policy import DeviceView
from shared.messages import WorkerRegistered


def register(world: World, kind: str, name: str, *, model: str, **changes: object) -> None:
    info = replace(make_worker(kind, name, name, model=model), **changes)  # type: ignore[arg-type]
    world.feed(WorkerRegistered(worker=info))


def view(world: World, unet: str) -> DeviceView:
    cluster = world.core._cluster
    return view_device(cluster, cluster.unets[unet], sort_requests(cluster), world.now)


def test_a_worker_is_planned_by_the_chunks_of_its_own_model_s_decoder() -> None:
    world = World()
    register(world, "unet", "unet-m", model="m")
    register(world, "vae", "vae-n", model="n", num_chunks=9, decode_ms=900.0)
    register(world, "vae", "vae-m", model="m", num_chunks=3, decode_ms=30.0)
    decode = world.core.unets["unet-m"].profile.decode("64x64")
    assert decode
    assert decode.chunk_ms == (10.0, 10.0, 10.0)


def test_waiting_requests_count_for_their_own_model_s_workers_by_batch_key() -> None:
    world = World()
    for name, model in (("unet-m0", "m"), ("unet-m1", "m"), ("unet-n", "n")):
        register(world, "unet", name, model=model, device_group=name, max_requests=1)
    for number in range(8):
        world.submit(make_request(f"m{number}", model="m"))
        world.submit(make_request(f"wide{number}", model="m", side=128))
        world.submit(make_request(f"n{number}", model="n"))
    assert view(world, "unet-m0").waiting == {
        BatchKey("m", 64, 64): 3.5,
        BatchKey("m", 128, 128): 3.5,
    }
    assert view(world, "unet-n").waiting == {BatchKey("n", 64, 64): 7.0}
