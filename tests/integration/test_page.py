"""The page in a real browser, on a real gateway with a painted backend."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from fake_backend import FakeBackend
from gateways import RunningGateway
from playwright.async_api import Page, async_playwright, expect
from redis_server import RedisServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
]


@pytest_asyncio.fixture
async def backend(redis_server: RedisServer) -> AsyncIterator[FakeBackend]:
    async with FakeBackend(redis_server.url, step_s=0.01).running() as running:
        yield running


@pytest_asyncio.fixture
async def page(backend: FakeBackend, gateway: RunningGateway) -> AsyncIterator[Page]:
    """The page at /, ready; a script error, or anything asked of another host, fails the test."""
    await gateway.ready()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = await browser.new_page()
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        errors: list[str] = []
        hosts: set[str] = set()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        await page.goto(gateway.service.url)
        await expect(page.locator("#health")).to_have_text("Ready")
        yield page
        assert not errors
        assert {host.split(":")[0] for host in hosts} <= {"127.0.0.1", ""}  # a blob has no host
        await browser.close()


async def order(page: Page, prompt: str) -> None:
    await page.get_by_label("What should the picture show?").fill(prompt)
    await page.get_by_role("button", name="Make it").click()


async def test_a_prompt_becomes_pictures_that_can_be_saved(page: Page) -> None:
    await page.get_by_role("combobox", name="Pictures").select_option("2")
    await order(page, "a happy cat")
    cards = page.locator(".card[data-state=done]")
    await expect(cards).to_have_count(2)
    widths = await cards.locator("img").evaluate_all("all => all.map(one => one.naturalWidth)")
    assert widths == [128, 128]
    await expect(cards.first.locator(".facts")).to_contain_text("seed")
    async with page.expect_download() as saved:
        await cards.first.get_by_text("Save").click()
    name = (await saved.value).suggested_filename
    assert name.startswith("a-happy-cat-")
    assert name.endswith(".png")


async def test_the_options_come_from_the_model_and_reach_the_server(
    page: Page, backend: FakeBackend
) -> None:
    await page.get_by_text("Options").click()
    samplers = await page.get_by_label("Sampler").locator("option").all_text_contents()
    assert samplers == ["ddim", "euler", "lcm"]
    await page.get_by_label("Sampler").select_option("euler")
    await page.get_by_label("Size").select_option("128x192")
    await page.get_by_label("Steps").fill("7")
    await page.get_by_label("Seed").fill("9007199254740993")
    await order(page, "red apple")
    card = page.locator(".card[data-state=done]")
    await expect(card.locator(".facts")).to_contain_text("seed 9007199254740993")
    [seen] = backend.seen
    parameters = seen.parameters
    assert (parameters.sampler, parameters.num_inference_steps) == ("euler", 7)
    assert (parameters.width, parameters.height) == (128, 192)
    assert parameters.seed == 9007199254740993


async def test_a_picture_can_be_cancelled_and_tried_again(page: Page, backend: FakeBackend) -> None:
    await order(page, "hold on")
    await page.get_by_role("button", name="Cancel").click()
    await expect(page.locator(".card .stage")).to_have_text("Cancelled.")
    backend.release()
    await page.get_by_role("button", name="Try again").click()
    await expect(page.locator(".card[data-state=done]")).to_have_count(1)
    assert len(backend.cancelled) == 1


async def test_a_bad_value_is_told_at_its_field(page: Page) -> None:
    await order(page, "   ")
    await expect(page.locator("#problem")).to_have_text("Say first what the picture should show.")
    await page.get_by_text("Options").click()
    await page.get_by_label("Steps").fill("0")
    await order(page, "red apple")
    await expect(page.locator("#problem")).to_contain_text("Steps")
    await expect(page.get_by_label("Steps")).to_have_attribute("aria-invalid", "true")
    await expect(page.locator(".card")).to_have_count(0)


async def test_the_documentation_works_offline(page: Page, gateway: RunningGateway) -> None:
    await page.goto(f"{gateway.service.url}/docs")
    await expect(page.locator("body")).to_contain_text("num_inference_steps")
