"""More requests than there is time for: what is answered, what is refused, and how truly.

Everything is asked over HTTP of a running gateway; a request is the same picture with another seed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import aiohttp

NUM_STEPS: Final = 20
HEALTH_EVERY_S: Final = 0.1
BIG_ORDER: Final = 8
"""Pictures of an order that fills the queue well beyond its limit."""


@dataclass(slots=True)
class Answers:
    """What became of the requests of one load. Latencies in seconds, of pictures alone."""

    num_by_status: dict[int, int] = field(default_factory=dict)
    num_without_retry_after: int = 0
    latencies_s: list[float] = field(default_factory=list)
    health_ms: list[float] = field(default_factory=list)

    def note(self, status: int, latency_s: float, *, has_retry_after: bool) -> None:
        """Count one answer."""
        self.num_by_status[status] = self.num_by_status.get(status, 0) + 1
        if status == HTTPStatus.OK:
            self.latencies_s.append(latency_s)
        elif status == HTTPStatus.TOO_MANY_REQUESTS:
            self.num_without_retry_after += not has_retry_after


class Load:
    """Asks a gateway for pictures.

    Args:
        session: Its base is the gateway's address.
        seed: Of the arrivals and the pictures.
    """

    def __init__(self, session: aiohttp.ClientSession, *, seed: int) -> None:
        self._session = session
        self._rng = random.Random(seed)
        self._seeds: Iterator[int] = itertools.count(seed * 1_000_000)

    async def capacity(self, *, clients: int, pictures: int) -> float:
        """Return the pictures a second that so many clients get, each asking for the next at once.

        The first from every client warm the stack up and are not counted.
        """
        left = iter(range(pictures))

        async def ask() -> None:
            for _ in left:
                await self._ask_until_served()

        await asyncio.gather(*(self._ask_until_served() for _ in range(clients)))
        began_at = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(clients)))
        return pictures / (time.perf_counter() - began_at)

    async def open_loop(self, *, per_s: float, duration_s: float) -> Answers:
        """Return what became of requests that arrive at random, whatever has been answered."""
        answers = Answers()
        pulse = asyncio.create_task(self._watch_health(answers))
        ends_at = time.perf_counter() + duration_s
        next_at = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while next_at < ends_at:
                await asyncio.sleep(max(0.0, next_at - time.perf_counter()))
                group.create_task(self._ask_once(answers))
                next_at += self._rng.expovariate(per_s)
        pulse.cancel()
        await asyncio.wait({pulse})
        return answers

    async def retry_after_errors(self, rounds: int) -> list[float]:
        """Return how far off `Retry-After` was, as a fraction of it, in each round.

        Large orders fill the queue until one is refused; then the same is asked again and again,
        and the moment from which it is accepted is compared with the one that was promised.
        """
        errors = []
        for _ in range(rounds):
            orders: set[asyncio.Task[float | None]] = set()
            promised_s = None
            while promised_s is None:
                order = asyncio.create_task(self._refusal_s())
                done, _ = await asyncio.wait({order}, timeout=0.1)
                if done:
                    promised_s = order.result()
                else:
                    orders.add(order)
            actual_s, accepted = await self._accepted_after_s(promised_s)
            errors.append(abs(actual_s - promised_s) / promised_s)
            await asyncio.gather(*orders, accepted)
        return errors

    async def _accepted_after_s(
        self, promised_s: float
    ) -> tuple[float, asyncio.Task[float | None]]:
        """Return when an order is not refused any more, and that order."""
        began_at = time.perf_counter()
        pause_s = min(0.1, promised_s / 20)
        while True:
            asked_at = time.perf_counter()
            order = asyncio.create_task(self._refusal_s())
            done, _ = await asyncio.wait({order}, timeout=0.25)
            if not done or order.result() is None:
                return asked_at - began_at, order
            await asyncio.sleep(pause_s)

    async def _refusal_s(self) -> float | None:
        """Ask for a large order; return the seconds until a retry, None if it was done."""
        async with self._session.post(
            "/v1/images/generations", json=self._body(BIG_ORDER)
        ) as reply:
            await reply.read()
            if reply.status == HTTPStatus.OK:
                return None
            return retry_after_s(reply)

    async def _ask_once(self, answers: Answers) -> None:
        began_at = time.perf_counter()
        async with self._session.post("/v1/images/generations", json=self._body()) as reply:
            await reply.read()
            answers.note(
                reply.status,
                time.perf_counter() - began_at,
                has_retry_after="Retry-After" in reply.headers,
            )

    async def _ask_until_served(self) -> None:
        while True:
            async with self._session.post("/v1/images/generations", json=self._body()) as reply:
                await reply.read()
                if reply.status == HTTPStatus.OK:
                    return
                await asyncio.sleep(min(1.0, retry_after_s(reply)))

    async def _watch_health(self, answers: Answers) -> None:
        while True:
            began_at = time.perf_counter()
            async with self._session.get("/healthz") as reply:
                await reply.read()
            answers.health_ms.append(1000 * (time.perf_counter() - began_at))
            await asyncio.sleep(HEALTH_EVERY_S)

    def _body(self, count: int = 1) -> dict[str, Any]:
        return {
            "prompt": "red apple",
            "n": count,
            "seed": next(self._seeds),
            "num_inference_steps": NUM_STEPS,
            "response_format": "url",
        }


def retry_after_s(reply: aiohttp.ClientResponse) -> float:
    """Return the seconds after which a refused client should ask again.

    Raises:
        aiohttp.ClientResponseError: The answer is no refusal that says so.
    """
    if "Retry-After" not in reply.headers:
        raise aiohttp.ClientResponseError(
            reply.request_info, reply.history, status=reply.status, message="no Retry-After"
        )
    milliseconds = reply.headers.get("Retry-After-Ms")
    return float(milliseconds) / 1000 if milliseconds else float(reply.headers["Retry-After"])
