"""A scheduler and its workers in a few lines: takes open requests and commits painted pictures.

Words in a prompt steer what becomes of it: "hold" waits for `release`, "fail" fails it, "long"
comes with a warning. Everything else is painted, step by step, `step_s` seconds each.
"""

from __future__ import annotations

import asyncio
import colorsys
import io
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from PIL import Image, ImageDraw
from redis.asyncio import Redis

from shared import codec, keys
from shared.messages import (
    GenerateImage,
    ImageDecoded,
    ImageParameters,
    ModelInfo,
    RequestCancelled,
    RequestProgress,
    RequestsProgressed,
    WorkerInfo,
    WorkerRegistered,
)
from shared.records import Commit, Outcome, Records, Retention
from shared.streams import Streams, connect, script

CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

MODEL = ModelInfo(
    model_id="fake",
    latent_channels=4,
    vae_scale_factor=8,
    default_height=128,
    default_width=128,
    side_multiple=8,
    max_side=256,
    max_prompt_tokens=75,
    prediction_type="epsilon",
    samplers=("ddim", "euler", "lcm"),
    default_sampler="ddim",
    max_steps_by_sampler={"lcm": 50},
)


def make_worker(kind: str, model: ModelInfo = MODEL, *, number: int = 0) -> WorkerInfo:
    """A worker as it would introduce itself."""
    return WorkerInfo(
        worker_id=f"{kind}-{number}",
        incarnation=f"{model.model_id}-{kind}-{number}-{random.randbytes(3).hex()}",
        kind=kind,
        device_group="host:cpu",
        host="host",
        device="cpu",
        dtype="float32",
        threads=2,
        max_requests=64,
        model_id=model.model_id,
        model=model if kind == "unet" else None,
    )


async def register(redis: Redis, worker: WorkerInfo, *, ttl_ms: int = 600_000) -> None:
    """One heartbeat."""
    name = worker.incarnation
    await script(redis, "heartbeat")(
        keys=[keys.worker(name), keys.WORKERS, keys.SCHEDULER, keys.work(name), keys.control(name)],
        args=[
            codec.encode_value(worker),
            ttl_ms,
            codec.encode(WorkerRegistered(worker=worker)),
            name,
        ],
    )


async def write_status(
    redis: Redis,
    queue: list[str],
    *,
    capacity: dict[str, dict[str, float]] | None = None,
    ttl_s: int = 600,
) -> None:
    """What a scheduler writes every second."""
    status = {"queue": queue, "capacity": capacity or {}}
    await redis.set(keys.STATUS, codec.encode_value(status), ex=ttl_s)


def paint(parameters: ImageParameters) -> bytes:
    """A face whose colours follow from the seed, with its arguments beside it if it is a PNG."""
    chance = random.Random(parameters.seed)
    size = (parameters.width, parameters.height)
    hue = chance.random()

    def colour(lightness: float, turn: float = 0.0) -> tuple[int, int, int]:
        red, green, blue = colorsys.hls_to_rgb((hue + turn) % 1, lightness, 0.8)
        return round(red * 255), round(green * 255), round(blue * 255)

    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    width, height = size
    draw.ellipse((0.08 * width, 0.08 * height, 0.92 * width, 0.92 * height), fill=colour(0.6))
    for x in (0.35, 0.65):
        eye = (x - 0.06, 0.35 - 0.08 * chance.random(), x + 0.06, 0.48)
        draw.ellipse(
            tuple(part * (width if i % 2 == 0 else height) for i, part in enumerate(eye)),
            fill=colour(0.15),
        )
    mouth = (0.3 * width, 0.45 * height, 0.7 * width, 0.78 * height)
    draw.arc(mouth, 20, 160, fill=colour(0.2, 0.5), width=max(2, width // 24))
    buffer = io.BytesIO()
    image.save(buffer, format=parameters.output_format)
    return buffer.getvalue()


class FakeBackend:
    """Runs beside a gateway on the same Redis. cancelled: ids the gateway gave up, in order."""

    def __init__(
        self, url: str, *, step_s: float = 0.0, retention: Retention | None = None
    ) -> None:
        self._redis = connect(url)
        self._records = Records(self._redis, retention=retention or Retention())
        self._streams = Streams(self._redis)
        self._step_s = step_s
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._released = asyncio.Event()
        self.cancelled: list[str] = []
        self.seen: list[GenerateImage] = []

    @property
    def redis(self) -> Redis:
        """Its connection."""
        return self._redis

    def release(self) -> None:
        """Let the held requests go on."""
        self._released.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeBackend]:
        """Registered and at work, until left."""
        for kind in ("unet", "vae"):
            await register(self._redis, make_worker(kind))
        await write_status(self._redis, [])
        task = asyncio.create_task(self._run())
        try:
            yield self
        finally:
            pending = {task, *self._jobs.values()}
            while pending:  # the Redis client may forget a cancellation
                for each in pending:
                    each.cancel()
                _, pending = await asyncio.wait(pending, timeout=0.1)
            await self._redis.aclose()

    async def _run(self) -> None:
        positions = {keys.REQUESTS: "0", keys.SCHEDULER: "0"}
        while True:
            for entry in await self._streams.read(positions, count=100, block_ms=500):
                positions[entry.stream] = entry.entry_id
                match entry.message:
                    case GenerateImage() as request:
                        self.seen.append(request)
                        job = asyncio.create_task(self._make(request))
                        self._jobs[request.request_id] = job
                    case RequestCancelled(request_id=request_id):
                        self.cancelled.append(request_id)
                        self._jobs[request_id].cancel()

    async def _make(self, request: GenerateImage) -> None:
        request_id, parameters = request.request_id, request.parameters
        if "hold" in parameters.prompt:
            waiting = [other.request_id for other in self.seen if "hold" in other.parameters.prompt]
            await write_status(self._redis, waiting)
            await self._released.wait()
        await self._records.begin_attempt(request_id, "1-1")
        if "fail" in parameters.prompt:
            await self._records.fail(
                request_id, code="not_finite", reason="The latents are not finite."
            )
            return
        num_steps = parameters.num_inference_steps
        for step in range(1, num_steps + 1):
            item = RequestProgress(
                request_id=request_id, state="running", step=step, num_steps=num_steps
            )
            await self._streams.notify(RequestsProgressed(items=(item,)))
            await asyncio.sleep(self._step_s)
        await self._commit(request)

    async def _commit(self, request: GenerateImage) -> None:
        image = paint(request.parameters)
        is_long = "long" in request.parameters.prompt
        await self._records.commit(
            Commit(
                decoded=ImageDecoded(
                    incarnation="fake-vae",
                    request_id=request.request_id,
                    attempt="1-1",
                    decode_ms=1.0,
                    transport="shm",
                ),
                image=image,
                outcome=Outcome(
                    content_type=CONTENT_TYPES[request.parameters.output_format],
                    size_bytes=len(image),
                    seed=request.parameters.seed,
                    skipped_steps=(4, 6),
                    warnings=("The prompt was cut.",) if is_long else (),
                    decode_s=0.001,
                    transport="shm",
                ),
            )
        )
