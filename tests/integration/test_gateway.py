from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import openai
import pytest
import pytest_asyncio
from fake_backend import MODEL, FakeBackend, paint, write_status
from gateways import RunningGateway
from PIL import Image
from redis_server import RedisServer

from services.gateway.fleet_watch import LOOK_INTERVAL_S
from services.gateway.order import limits_of, order_images
from services.gateway.validation import GenerationBody
from shared import keys
from shared.records import Records, Retention
from shared.settings import GatewaySettings

GENERATIONS = "/v1/images/generations"
BODY = {"prompt": "a cat"}
LIMITS = limits_of(MODEL, GatewaySettings())


@pytest_asyncio.fixture
async def backend(redis_server: RedisServer) -> AsyncIterator[FakeBackend]:
    async with FakeBackend(redis_server.url).running() as running:
        yield running


@pytest_asyncio.fixture
async def ready(backend, gateway):
    await gateway.ready()
    return gateway


async def eventually(look: Callable[[], Awaitable[object]], wanted: object) -> None:
    async with asyncio.timeout(30):
        while await look() != wanted:  # noqa: ASYNC110 - conditions of any kind
            await asyncio.sleep(0.02)


async def seen(backend: FakeBackend, count: int) -> None:
    async def look() -> int:
        return len(backend.seen)

    await eventually(look, count)


async def cancelled(backend: FakeBackend, count: int) -> None:
    async def look() -> int:
        return len(backend.cancelled)

    await eventually(look, count)


async def post(gateway: RunningGateway, **body: object) -> dict[str, Any]:
    async with gateway.http.post(GENERATIONS, json=body) as response:
        return await response.json()


async def status_of(gateway: RunningGateway, url: str) -> int:
    async with gateway.http.get(url) as response:
        return response.status


async def reasons(gateway: RunningGateway) -> list[str]:
    async with gateway.http.get("/readyz") as response:
        answer = await response.json()
        assert answer["ready"] == (response.status == 200) == (not answer["reasons"])
        return answer["reasons"]


def open_image(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


async def test_the_openai_client_gets_several_pictures_with_consecutive_seeds(ready) -> None:
    reply = await ready.openai.images.generate(
        prompt="a red apple",
        n=3,
        size="64x128",
        extra_body={"seed": 5, "num_inference_steps": 2, "guidance_scale": 3.5, "odd": 1},
    )
    assert [image.seed for image in reply.data] == [5, 6, 7]
    assert len({image.request_id for image in reply.data}) == 3
    assert {open_image(image.b64_json).size for image in reply.data} == {(64, 128)}
    assert reply.data[0].skipped_steps == [4, 6]
    assert (reply.size, reply.output_format, reply.background) == ("64x128", "png", "opaque")
    assert reply.usage.total_tokens == 3 + 3 * 8 * 16
    assert reply.warnings == ["'odd' is not known here and was ignored."]


async def test_a_link_leads_to_the_picture(ready) -> None:
    reply = await ready.openai.images.generate(
        prompt="a cat", response_format="url", output_format="webp"
    )
    url = reply.data[0].url
    assert url == f"{ready.service.url}/v1/images/{reply.data[0].request_id}"
    async with ready.http.get(url) as response:
        assert response.status == 200
        assert response.content_type == "image/webp"
        assert Image.open(io.BytesIO(await response.read())).size == (128, 128)


async def test_links_begin_with_the_public_address_if_there_is_one(backend, start_gateway) -> None:
    gateway = await start_gateway(public_url="https://pictures.example/sd")
    await gateway.ready()
    reply = await gateway.openai.images.generate(prompt="a cat", response_format="url")
    assert reply.data[0].url.startswith("https://pictures.example/sd/v1/images/img_")


async def test_a_random_seed_is_told_and_a_warning_is_passed_on(ready, backend) -> None:
    reply = await ready.openai.images.generate(prompt="a long story")
    assert reply.data[0].seed == backend.seen[0].parameters.seed
    assert reply.data[0].warnings == ["The prompt was cut."]
    assert backend.seen[0].parameters.guidance_skip == "balanced"


async def test_no_clock_of_the_gateway_goes_into_a_request(ready, backend) -> None:
    reply = await ready.openai.images.generate(prompt="a cat", extra_body={"deadline_ms": 60_000})
    assert (backend.seen[0].submitted_at, backend.seen[0].deadline_ms) == (0.0, 60_000)
    seconds, _ = await backend.redis.time()
    record = await Records(backend.redis).read(reply.data[0].request_id)
    assert abs(record.submitted_at - seconds) < 60


async def test_the_openai_client_streams_one_picture(ready) -> None:
    stream = await ready.openai.images.generate(
        prompt="a cat", stream=True, partial_images=2, extra_body={"num_inference_steps": 3}
    )
    events = [event async for event in stream]
    assert [event.type for event in events] == ["image_generation.completed"]
    assert open_image(events[0].b64_json).size == (128, 128)
    assert events[0].usage.output_tokens == 256


async def test_a_stream_tells_the_progress_in_comment_lines(ready) -> None:
    body = {"prompt": "a cat", "stream": True, "num_inference_steps": 4, "seed": 1}
    async with ready.http.post(GENERATIONS, json=body) as response:
        assert response.content_type == "text/event-stream"
        assert response.headers["X-Accel-Buffering"] == "no"
        lines = (await response.text()).splitlines()
    told = [json.loads(line[2:]) for line in lines if line.startswith(": ")]
    assert (told[0]["state"], told[0]["step"]) == ("queued", 0)
    assert all(facts["request_id"] == told[0]["request_id"] for facts in told)
    steps = [facts["step"] for facts in told]
    assert steps == sorted(steps)
    assert lines[-3] == "event: image_generation.completed"


async def test_a_failure_in_mid_stream_is_an_error_event(ready) -> None:
    stream = await ready.openai.images.generate(prompt="fail", stream=True)
    with pytest.raises(openai.APIError, match="not finite"):
        [event async for event in stream]


async def test_a_failed_request_is_a_server_error_that_is_not_retried(ready) -> None:
    with pytest.raises(openai.InternalServerError, match="not finite") as caught:
        await ready.openai.images.generate(prompt="fail")
    assert caught.value.body["code"] == "not_finite"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.request_id.startswith("req_")


async def test_errors_are_typed_and_name_the_field(ready) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await ready.openai.images.generate(prompt="a cat", size="1x1")
    assert bad.value.param == "size"
    assert "from 8 to 256 in multiples of 8" in bad.value.message
    with pytest.raises(openai.NotFoundError) as unknown:
        await ready.openai.images.generate(prompt="a cat", model="dall-e-3")
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match="do not say which picture"):
        await ready.openai.images.generate(prompt="a cat", n=2, stream=True)


@pytest.mark.parametrize(
    ("payload", "content_type", "status", "words"),
    [
        (b"{", "application/json", 400, "not valid JSON"),
        (b"[]", "application/json", 400, "a JSON object"),
        (b'{"prompt": "x"}', "text/plain", 415, "application/json"),
        (b'{"prompt": "x", "n": NaN}', "application/json", 400, "'n'"),
    ],
)
async def test_a_bad_body_is_an_error_object(ready, payload, content_type, status, words) -> None:
    headers = {"Content-Type": content_type}
    async with ready.http.post(GENERATIONS, data=payload, headers=headers) as response:
        assert response.status == status
        error = (await response.json())["error"]
        assert words in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


async def test_a_body_of_ten_megabytes_is_refused(ready) -> None:
    body = io.BytesIO(b'{"prompt": "' + b"x" * 10_000_000 + b'"}')
    headers = {"Content-Type": "application/json"}
    async with ready.http.post(GENERATIONS, data=body, headers=headers) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "body_too_large"


async def test_unknown_paths_and_methods_are_error_objects(ready) -> None:
    async with ready.http.get("/v1/nothing") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "not_found"
        assert response.headers["x-request-id"].startswith("req_")
    async with ready.http.put("/v1/models") as response:
        assert response.status == 405
        assert "GET" in response.headers["Allow"]
        assert (await response.json())["error"]["code"] == "method_not_allowed"


async def test_too_many_open_requests_are_told_when_to_come_back(backend, start_gateway) -> None:
    gateway = await start_gateway(max_open_requests=2)
    await gateway.ready()
    waiting = asyncio.create_task(gateway.openai.images.generate(prompt="hold", n=2))
    await seen(backend, 2)
    with pytest.raises(openai.RateLimitError) as caught:
        await gateway.openai.images.generate(prompt="one more")
    assert caught.value.response.headers["Retry-After"] == "2"
    assert caught.value.response.headers["retry-after-ms"] == "2000"
    backend.release()
    assert len((await waiting).data) == 2
    await gateway.openai.images.generate(prompt="one more")


CAPACITY = {"row_ms": 100.0, "decode_ms": 100.0, "overhead_ms": 0.0}
"""Ten guided steps take 2.1 s."""


async def start_with_backlog(
    start_gateway, backend: FakeBackend, backlog_ms: float, **settings: object
) -> RunningGateway:
    capacity = {"fake": {"backlog_ms": backlog_ms, **CAPACITY}}
    await write_status(backend.redis, [], capacity=capacity, ttl_s=keys.STATUS_TTL_S)
    gateway = await start_gateway(**settings)
    await gateway.ready()
    return gateway


async def test_a_request_whose_turn_would_come_too_late_is_told_when_to_come_back(
    backend, start_gateway
) -> None:
    gateway = await start_with_backlog(start_gateway, backend, 20_000, request_timeout_s=15)
    body = {"prompt": "a cat", "num_inference_steps": 10}
    async with gateway.http.post(GENERATIONS, json=body) as response:
        assert response.status == 429
        error = (await response.json())["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
        assert 8_000 < int(response.headers["retry-after-ms"]) <= 12_500
        assert response.headers["Retry-After"] in {"9", "10", "11", "12", "13"}
    late = {**body, "deadline_ms": 10_000}
    async with gateway.http.post(GENERATIONS, json=late) as response:
        assert response.status == 429
    assert not backend.seen


async def test_what_was_accepted_since_the_scheduler_last_spoke_counts(
    backend, start_gateway
) -> None:
    gateway = await start_with_backlog(start_gateway, backend, 0, max_wait_s=12)
    body = {"prompt": "a cat", "num_inference_steps": 10}
    answers = [await gateway.http.post(GENERATIONS, json=body | {"n": n}) for n in (1, 5, 1)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert len(backend.seen) == 6


async def test_an_idle_service_accepts_what_takes_long(backend, start_gateway) -> None:
    gateway = await start_with_backlog(start_gateway, backend, 0, max_wait_s=0)
    reply = await gateway.openai.images.generate(
        prompt="a cat", n=3, extra_body={"num_inference_steps": 150}
    )
    assert len(reply.data) == 3


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_client_that_goes_away_cancels_its_requests(ready, backend, is_streamed) -> None:
    body = {"prompt": "hold", "n": 1 if is_streamed else 2, "stream": is_streamed}
    asking = asyncio.create_task(ready.http.post(GENERATIONS, json=body))
    await seen(backend, body["n"])
    if is_streamed:
        (await asking).close()
    else:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await cancelled(backend, body["n"])
    assert {request.request_id for request in backend.seen} == set(backend.cancelled)
    assert await backend.redis.xlen(keys.REQUESTS) == 0


async def test_a_picture_that_fails_cancels_those_it_was_asked_for_with(ready, backend) -> None:
    asking = asyncio.create_task(ready.openai.images.generate(prompt="hold", n=3))
    await seen(backend, 3)
    victim = backend.seen[1].request_id
    await Records(backend.redis).fail(victim, code="not_finite", reason="On purpose.")
    with pytest.raises(openai.InternalServerError, match=f"{victim} failed: On purpose"):
        await asking
    await cancelled(backend, 2)


async def test_a_request_that_takes_too_long_is_cancelled(backend, start_gateway) -> None:
    gateway = await start_gateway(request_timeout_s=0.2)
    await gateway.ready()
    with pytest.raises(openai.InternalServerError) as caught:
        await gateway.openai.images.generate(prompt="hold")
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    stream = await gateway.openai.images.generate(prompt="hold", stream=True)
    with pytest.raises(openai.APIError, match="in time"):
        [event async for event in stream]
    await cancelled(backend, 2)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_request_whose_deadline_is_over_is_cancelled(ready, backend, is_streamed) -> None:
    body = {"prompt": "hold", "deadline_ms": 50, "stream": is_streamed}
    async with ready.http.post(GENERATIONS, json=body) as response:
        assert '"code":"timeout"' in await response.text()
    await cancelled(backend, 1)


async def test_what_can_not_be_cancelled_now_is_cancelled_later(ready, backend) -> None:
    asking = asyncio.create_task(ready.http.post(GENERATIONS, json={"prompt": "hold"}))
    await seen(backend, 1)
    await backend.redis.config_set("min-replicas-to-write", 1)
    asking.cancel()
    await asyncio.sleep(0.5)
    assert not backend.cancelled
    await backend.redis.config_set("min-replicas-to-write", 0)
    await cancelled(backend, 1)


async def test_a_request_s_status_can_be_watched_and_the_request_be_cancelled(
    ready, backend
) -> None:
    asking = asyncio.create_task(ready.openai.images.generate(prompt="hold"))
    await seen(backend, 1)
    name = backend.seen[0].request_id

    async def look() -> tuple[object, ...]:
        async with ready.http.get(f"/v1/requests/{name}") as response:
            status = await response.json()
            return status["state"], status["queue_position"], status["parameters"]["prompt"]

    await eventually(look, ("queued", 1, "hold"))
    async with ready.http.get(f"/v1/images/{name}") as response:
        assert response.status == 202
        assert response.headers["Retry-After"] == "1"
    async with ready.http.delete(f"/v1/requests/{name}") as response:
        assert (await response.json())["state"] == "cancelled"
    with pytest.raises(openai.APIStatusError) as caught:
        await asking
    assert caught.value.status_code == 410
    async with ready.http.get(f"/v1/images/{name}") as response:
        assert response.status == 410
        assert (await response.json())["error"]["code"] == "cancelled"


async def test_a_finished_request_keeps_its_state_when_it_is_cancelled(ready) -> None:
    reply = await ready.openai.images.generate(prompt="a cat")
    async with ready.http.delete(f"/v1/requests/{reply.data[0].request_id}") as response:
        status = await response.json()
    assert status["state"] == "done"
    assert status["outcome"]["content_type"] == "image/png"
    assert status["url"].endswith(status["id"])
    assert status["total_s"] >= status["waited_s"] >= 0


async def test_an_address_of_openais_is_not_taken_for_a_picture(ready) -> None:
    async with ready.http.get(GENERATIONS) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
    async with ready.http.post("/v1/images/edits") as response:
        assert response.status == 404
        assert "/docs" in (await response.json())["error"]["message"]


async def test_an_unknown_picture_is_404_and_an_expired_one_410(ready, backend) -> None:
    for name in ("img_none", "..%2f", "x" * 500):
        async with ready.http.get(f"/v1/images/{name}") as response:
            assert response.status == 404
    reply = await ready.openai.images.generate(prompt="a cat", response_format="url")
    record = await Records(backend.redis).read(reply.data[0].request_id)
    await backend.redis.delete(record.image_key)
    async with ready.http.get(reply.data[0].url) as response:
        assert response.status == 410
        assert (await response.json())["error"]["code"] == "image_expired"


async def test_the_oldest_pictures_make_room_for_newer_ones(redis_server, gateway) -> None:
    body = {"prompt": "a cat", "size": "64x64", "response_format": "url", "seed": 1}
    size = len(paint(order_images(GenerationBody(**body), LIMITS, random_seed=0).images[0]))
    retention = Retention(image_budget_bytes=2 * size)
    async with FakeBackend(redis_server.url, retention=retention).running():
        await gateway.ready()
        replies = [await post(gateway, **body) for _ in range(3)]
        urls = [reply["data"][0]["url"] for reply in replies]
        assert [await status_of(gateway, url) for url in urls] == [410, 200, 200]


async def test_pictures_expire(redis_server, gateway) -> None:
    retention = Retention(image_ttl_s=1)
    async with FakeBackend(redis_server.url, retention=retention).running():
        await gateway.ready()
        reply = await post(gateway, prompt="a cat", response_format="url")
        url = reply["data"][0]["url"]
        await eventually(lambda: status_of(gateway, url), 410)


async def test_models_are_listed_with_their_limits_and_defaults(ready) -> None:
    models = [model async for model in ready.openai.models.list()]
    assert [model.id for model in models] == ["fake"]
    model = await ready.openai.models.retrieve("fake")
    assert model.samplers == ["ddim", "euler", "lcm"]
    assert model.sizes == {"default": "128x128", "multiple": 8, "max_side": 256}
    assert model.limits["num_inference_steps"] == {"ddim": 150, "euler": 150, "lcm": 50}
    assert model.defaults["guidance_skip"] == "balanced"
    assert model.ready is True
    with pytest.raises(openai.NotFoundError):
        await ready.openai.models.retrieve("org/other")


async def test_without_workers_nothing_is_accepted_and_the_reasons_are_told(gateway) -> None:
    why = ["no scheduler is alive", "no UNet worker has registered"]
    await eventually(lambda: reasons(gateway), why)
    with pytest.raises(openai.InternalServerError) as caught:
        await gateway.openai.images.generate(prompt="a cat")
    assert caught.value.status_code == 503
    assert caught.value.response.headers["Retry-After"] == "2"
    assert await status_of(gateway, "/healthz") == 200


async def test_requests_wait_for_workers_that_restart(ready, backend) -> None:
    for incarnation in await backend.redis.smembers(keys.WORKERS):
        await backend.redis.delete(keys.worker(incarnation.decode()))
    why = ["the UNet worker of fake is missing", "the VAE worker of fake is missing"]
    await eventually(lambda: reasons(ready), why)
    assert len((await ready.openai.images.generate(prompt="a cat")).data) == 1


async def test_admission_stops_before_the_store_is_full(ready, backend) -> None:
    used = (await backend.redis.info("memory"))["used_memory"]
    await backend.redis.config_set("maxmemory", int(used * 1.05))

    async def look() -> str:
        return " ".join(await reasons(ready)).partition(" has used")[0]

    await eventually(look, "Redis")
    with pytest.raises(openai.InternalServerError) as caught:
        await ready.openai.images.generate(prompt="a cat")
    assert (caught.value.status_code, caught.value.code) == (503, "store_full")


async def test_a_store_that_refuses_writes_is_told_and_recovers(ready, backend) -> None:
    await backend.redis.config_set("min-replicas-to-write", 1)

    async def look() -> str:
        return " ".join(await reasons(ready)).partition(":")[0]

    await eventually(look, "Redis refuses to write")
    with pytest.raises(openai.InternalServerError) as caught:
        await ready.openai.images.generate(prompt="a cat")
    assert (caught.value.status_code, caught.value.code) == (503, "store_unavailable")
    assert caught.value.response.headers["Retry-After"] == "5"
    assert await status_of(ready, "/healthz") == 200
    await backend.redis.config_set("min-replicas-to-write", 0)
    await ready.ready()
    assert len((await ready.openai.images.generate(prompt="a cat")).data) == 1


@pytest.mark.parametrize("key", [keys.STATUS, keys.WORKERS])
async def test_what_makes_no_sense_in_the_store_does_not_end_the_gateway(
    ready, backend, key
) -> None:
    if key == keys.WORKERS:
        await backend.redis.sadd(key, b"\xff\xfe", b"x")
        await backend.redis.set(keys.worker("x"), b"\xc1")
    else:
        await backend.redis.set(key, b"\xc1")
        await eventually(lambda: reasons(ready), ["no scheduler is alive"])
    assert len((await ready.openai.images.generate(prompt="a cat")).data) == 1
    await asyncio.sleep(2 * LOOK_INTERVAL_S)
    assert not ready.task.done()


async def test_a_store_that_is_full_already_is_no_bug(ready, backend) -> None:
    await backend.redis.config_set("maxmemory", 1)
    with pytest.raises(openai.InternalServerError) as caught:
        await ready.openai.images.generate(prompt="a cat")
    assert (caught.value.status_code, caught.value.code) == (503, "store_full")


async def test_a_restart_of_redis_costs_no_waiting_client_its_pictures(
    ready, backend, redis_server
) -> None:
    asking = asyncio.create_task(ready.openai.images.generate(prompt="hold", n=2))
    await seen(backend, 2)
    redis_server.stop()
    await asyncio.sleep(0.3)
    redis_server.start()
    backend.release()
    assert len((await asyncio.wait_for(asking, 40)).data) == 2


async def test_nobody_waits_for_a_store_that_has_been_silent_for_a_while(
    ready, redis_server
) -> None:
    redis_server.stop()
    await eventually(lambda: reasons(ready), ["Redis does not answer"])
    for asking in (ready.http.get("/v1/images/img_1"), ready.http.post(GENERATIONS, json=BODY)):
        async with asyncio.timeout(10), asking as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "store_unavailable"
            assert "Retry-After" in response.headers
    redis_server.start()
    await ready.ready()


async def test_news_that_the_board_has_missed_comes_from_the_records(ready, backend) -> None:
    asking = asyncio.create_task(ready.openai.images.generate(prompt="hold"))
    await seen(backend, 1)
    name = backend.seen[0].request_id
    await backend.redis.hset(
        keys.request(name), mapping={"state": "failed", "code": "x", "reason": "in silence"}
    )
    with pytest.raises(openai.InternalServerError, match="in silence"):
        await asyncio.wait_for(asking, 30)


async def test_a_record_that_is_lost_frees_its_client(ready, backend) -> None:
    asking = asyncio.create_task(ready.openai.images.generate(prompt="hold"))
    await seen(backend, 1)
    await backend.redis.delete(keys.request(backend.seen[0].request_id))
    with pytest.raises(openai.InternalServerError) as caught:
        await asyncio.wait_for(asking, 30)
    assert (caught.value.status_code, caught.value.code) == (503, "request_lost")


async def test_a_gateway_that_stops_lets_its_clients_have_their_pictures(ready, backend) -> None:
    asking = asyncio.create_task(ready.openai.images.generate(prompt="hold"))
    await seen(backend, 1)
    ready.service.stop()
    assert await reasons(ready) == ["this gateway is shutting down"]
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        await ready.openai.images.generate(prompt="a cat")
    backend.release()
    assert len((await asking).data) == 1
    await asyncio.wait_for(asyncio.shield(ready.task), 30)


async def test_a_gateway_that_must_stop_at_once_cancels_what_its_clients_wait_for(
    ready, backend
) -> None:
    asking = asyncio.create_task(ready.openai.images.generate(prompt="hold"))
    await seen(backend, 1)
    ready.service.stop()
    ready.service.stop()
    with pytest.raises(openai.APIConnectionError):
        await asking
    await asyncio.wait_for(asyncio.shield(ready.task), 30)
    await cancelled(backend, 1)


async def test_many_clients_at_once_get_one_picture_each(ready) -> None:
    replies = await asyncio.gather(
        *(
            ready.openai.images.generate(
                prompt=f"picture {number}",
                size="8x8",
                extra_body={"seed": number, "num_inference_steps": 1},
            )
            for number in range(60)
        )
    )
    assert [reply.data[0].seed for reply in replies] == list(range(60))
    assert len({reply.data[0].request_id for reply in replies}) == 60


async def test_metrics_count_answers_by_route(ready) -> None:
    await ready.openai.models.retrieve("fake")
    async with ready.http.get("/metrics") as response:
        text = await response.text()
    assert 'route="/v1/models/{model_id}",status="200"' in text


async def test_the_pages_need_nothing_from_elsewhere(ready) -> None:
    for path in ("/", "/docs", "/ui/style.css", "/ui/page.js", "/ui/docs.js"):
        async with ready.http.get(path) as response:
            assert response.status == 200
            text = await response.text()
            etag = response.headers["ETag"]
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "http://" not in text.replace("http://www.w3.org/", "")
        assert "https://" not in text
        async with ready.http.get(path, headers={"If-None-Match": etag}) as response:
            assert response.status == 304


async def test_the_interface_describes_itself(ready) -> None:
    async with ready.http.get("/openapi.json") as response:
        spec = await response.json()
    schemas = spec["components"]["schemas"]
    body = spec["paths"][GENERATIONS]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"].rsplit("/")[-1] in schemas
    assert {"prompt", "seed", "sampler"} <= set(schemas["GenerationBody"]["properties"])
    used = {part.split('"')[0] for part in json.dumps(spec).split("#/components/schemas/")[1:]}
    assert used <= set(schemas)
