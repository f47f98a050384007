"""What the doctor says of the workers of a running service."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from redis_server import RedisServer
from scheduler_world import make_worker
from typer.testing import CliRunner

from cli.__main__ import app
from cli.pairs import pair_up
from shared import codec
from shared.messages import WorkerInfo
from shared.store import keys

UNET = replace(make_worker("unet", "unet-0", "u"), host="boot.1-2.u0", pool="synerdiff-u")
VAE = replace(make_worker("vae", "vae-0", "v"), host="boot.1-2.u0")
GPU = "cuda:aaaa+1.2"


@pytest.mark.parametrize(
    ("unet", "vae", "transport", "reason"),
    [
        ({}, {}, "shm", "CPU of one host"),
        ({}, {"host": "other.1-2.u0"}, "inline", "different hosts"),
        ({}, {"host": "boot.3-4.u0"}, "inline", "IPC namespace"),
        ({"pool": ""}, {}, "inline", "told"),
        ({"device": GPU}, {"device": GPU}, "cuda_ipc", "one GPU"),
        ({"device": GPU}, {"device": "cuda:aaaa+3.2"}, "inline", "namespaces"),
        ({"device": GPU}, {"device": "cuda:bbbb+1.2"}, "inline", "different GPUs"),
        ({"device": GPU}, {}, "inline", "on the CPU"),
    ],
)
def test_the_reason_fits_the_transport(unet, vae, transport: str, reason: str) -> None:
    (pair,) = pair_up([replace(UNET, **unet), replace(VAE, **vae)])
    assert pair.transport == transport
    assert reason in pair.reason


def test_only_workers_of_one_model_are_paired() -> None:
    assert not pair_up([UNET, replace(VAE, model_id="another")])


def register(server: RedisServer, *workers: WorkerInfo) -> None:
    with server.client() as client:
        for worker in workers:
            client.sadd(keys.WORKERS, worker.incarnation)
            client.set(keys.worker(worker.incarnation), codec.encode_value(worker))


def test_the_doctor_shows_each_pair_of_a_running_service(redis_server: RedisServer) -> None:
    register(redis_server, UNET, VAE, replace(VAE, worker_id="far", incarnation="f", host="x"))
    told = CliRunner().invoke(app, ["doctor", "--json", "--redis-url", redis_server.url]).stdout
    pairs = {pair["vae"]: pair["transport"] for pair in json.loads(told)["pairs"]}
    assert pairs == {"vae-0": "shm", "far": "inline"}


def test_the_doctor_leaves_out_what_it_cannot_read(redis_server: RedisServer) -> None:
    register(redis_server, UNET, VAE)
    with redis_server.client() as client:
        client.sadd(keys.WORKERS, "newer", b"\xff\xfe", "of another kind")
        client.set(keys.worker("newer"), b"\x81\xa1x\x01")
        client.rpush(keys.worker("of another kind"), "x")
    answer = CliRunner().invoke(app, ["doctor", "--json", "--redis-url", redis_server.url])
    assert [pair["vae"] for pair in json.loads(answer.stdout)["pairs"]] == ["vae-0"]
