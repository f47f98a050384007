"""Which UNet worker admits a request, which VAE worker gets latents, and how they reach it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_world import make_request, make_worker

from services.scheduler.core.placement import choose_unet, choose_vae, loads, transport_of
from services.scheduler.core.state import Request, Stage, UnetWorker, VaeWorker
from services.scheduler.devices.choice import profile_in_short
from services.scheduler.planning.threshold import Threshold
from shared.messages import LatentsFinished, TensorHandle

NO_GROUPS: frozenset[str] = frozenset()
UNET = replace(make_worker("unet", "unet-0", "u"), host="here", pool="synerdiff-u")


def unets() -> dict[str, UnetWorker]:
    profile = profile_in_short(UNET, ())
    return {"u": UnetWorker(info=UNET, profile=profile, threshold=Threshold(value=1.0))}


def vaes(**hosts: str) -> dict[str, VaeWorker]:
    return {
        name: VaeWorker(info=replace(make_worker("vae", name, name), host=host))
        for name, host in hosts.items()
    }


def finished(*, kind: str = "shm", inline_key: str = "") -> Request:
    request = Request(request=make_request("r"), stage=Stage.LATENTS)
    handle = TensorHandle(
        kind=kind,
        pool="synerdiff-u",
        owner="u",
        host="here",
        slot=0,
        generation=1,
        shape=(1,),
        dtype="float32",
        inline_key=inline_key,
    )
    request.latents = LatentsFinished(incarnation="u", request_id="r", attempt="1", handle=handle)
    return request


def test_latents_travel_by_what_both_workers_have_registered() -> None:
    found = vaes(near="here", far="there")
    latents = finished().latents
    assert latents
    assert transport_of(latents, found["near"], unets()) == "shm"
    assert transport_of(latents, found["far"], unets()) == "inline"


def test_they_travel_by_their_copy_where_their_producer_is_gone_or_had_no_room() -> None:
    (near,) = vaes(near="here").values()
    kept, unpooled = finished(inline_key="k").latents, finished(kind="inline").latents
    assert kept
    assert unpooled
    assert transport_of(kept, near, {}) == "inline"
    assert transport_of(unpooled, near, unets()) == "inline"


@pytest.mark.parametrize(("inline_key", "choice"), [("", "near"), ("copy", "far")])
def test_latents_without_a_copy_go_only_where_they_can_be_opened(
    inline_key: str, choice: str
) -> None:
    found = vaes(near="here", far="there")
    found["near"].decodes.append("another")  # so that the other one would be done first
    request = finished(inline_key=inline_key)
    assert choose_vae(request, found, unets(), NO_GROUPS) == choice


def test_latents_that_nobody_can_open_go_to_somebody_who_will_say_so() -> None:
    assert choose_vae(finished(), vaes(far="there"), unets(), NO_GROUPS) == "far"


def unets_alike(**rows_ms: float) -> dict[str, UnetWorker]:
    """Workers that take so long for each row."""
    found = {}
    for name, row_ms in rows_ms.items():
        step_ms = {rows: rows * row_ms for rows in (1, 2, 4)}
        info = replace(make_worker("unet", name, name), step_ms=step_ms)
        profile = profile_in_short(info, ())
        found[name] = UnetWorker(info=info, profile=profile, threshold=Threshold(value=1.0))
    return found


def resident(name: str, unet: str, steps: int) -> Request:
    return Request(
        request=make_request(name, steps=steps),
        stage=Stage.DENOISING,
        unet=unet,
        num_forwards=steps,
    )


def chosen(found: dict[str, UnetWorker], *residents: Request, factor: int = 2) -> str | None:
    waiting = Request(request=make_request("waiting", steps=10), stage=Stage.WAITING)
    return choose_unet(waiting, found, loads(residents, found), factor=factor)


def test_a_request_goes_where_it_is_predicted_to_finish_first() -> None:
    found = unets_alike(slow=10.0, fast=6.0)
    assert chosen(found) == "fast"
    assert chosen(found, resident("short", "fast", 3)) == "fast"
    assert chosen(found, resident("long", "fast", 20)) == "slow"


def test_a_worker_that_holds_enough_gets_no_more() -> None:
    found = unets_alike(slow=100.0, fast=1.0)
    held = [resident(f"r{i}", "fast", 1) for i in range(2)]
    assert chosen(found, *held, factor=2) == "slow"
    assert chosen(found, *held, factor=3) == "fast"
    both = [*held, *(resident(f"s{i}", "slow", 1) for i in range(2))]
    assert chosen(found, *both, factor=2) is None


@pytest.mark.parametrize("flaw", ["is_draining", "is_suspect"])
def test_a_worker_that_leaves_or_hangs_gets_nothing(flaw: str) -> None:
    found = unets_alike(slow=10.0, fast=1.0)
    setattr(found["fast"], flaw, True)
    assert chosen(found) == "slow"


def test_a_worker_of_another_model_gets_nothing() -> None:
    found = unets_alike(slow=10.0, fast=1.0)
    found["fast"].info = replace(found["fast"].info, model_id="another")
    assert chosen(found) == "slow"
