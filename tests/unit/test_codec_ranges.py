from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from fake_backend import MODEL, make_worker
from image_parameters import PARAMETERS

from shared import codec
from shared.errors import ProtocolError
from shared.messages import GenerateImage, RowReport, SlotDenoised, WorkerRegistered

REQUEST = GenerateImage(
    request_id="a",
    job_id="j",
    owner="",
    priority=-3,
    deadline_ms=0,
    submitted_at=1.5,
    parameters=PARAMETERS,
)
REPORT = RowReport(request_id="a", attempt="", has_run=True, next_step_index=-1)
DENOISED = SlotDenoised(incarnation="w", epoch=1, seq=1, duration_ms=2, rows=(REPORT,))
REGISTERED = WorkerRegistered(worker=replace(make_worker("unet", MODEL), step_ms={1: 2.0}))


@pytest.mark.parametrize("message", [REQUEST, DENOISED, REGISTERED])
def test_what_peers_send_is_read(message: Any) -> None:
    assert codec.decode(codec.encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        replace(REQUEST, request_id=""),
        replace(REQUEST, request_id="a" * 1_000),
        replace(REQUEST, priority=2**40),
        replace(REQUEST, priority=math.inf),  # type: ignore[arg-type]
        replace(REQUEST, submitted_at=math.nan),
        replace(REQUEST, deadline_ms=-1),
        replace(REQUEST, parameters=replace(PARAMETERS, height=0)),
        replace(REQUEST, parameters=replace(PARAMETERS, width=-64)),
        replace(REQUEST, parameters=replace(PARAMETERS, num_inference_steps=0)),
        replace(REQUEST, parameters=replace(PARAMETERS, guidance_scale=math.inf)),
        replace(REQUEST, parameters=replace(PARAMETERS, seed=-1)),
        replace(REQUEST, parameters=replace(PARAMETERS, prompt=3)),  # type: ignore[arg-type]
        replace(DENOISED, epoch=2**60),
        replace(DENOISED, duration_ms=-1.0),
        replace(DENOISED, rows=(replace(REPORT, next_step_index=-2),)),
        replace(DENOISED, rows=(replace(REPORT, has_run=1),)),  # type: ignore[arg-type]
        WorkerRegistered(worker=replace(REGISTERED.worker, step_ms={1: math.nan})),
        WorkerRegistered(worker=replace(REGISTERED.worker, step_ms={-1: 2.0})),
        WorkerRegistered(worker=replace(REGISTERED.worker, step_ms={1: -2.0})),
        WorkerRegistered(worker=replace(REGISTERED.worker, num_chunks=-1)),
    ],
)
def test_what_no_peer_sends_is_refused(message: Any) -> None:
    with pytest.raises(ProtocolError):
        codec.decode(codec.encode(message))
