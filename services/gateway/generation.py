"""Submits orders, waits for their pictures, and cancels what nobody waits for any more."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus

from redis.exceptions import OutOfMemoryError, RedisError

from services.gateway.admission import (
    Ledger,
    WaitLimits,
    check_admission,
    order_work_s,
    wait_s,
)
from services.gateway.events import EventBoard, Watch
from services.gateway.fleet_watch import FleetWatch
from services.gateway.http_errors import ApiError, failure, unavailable
from services.gateway.order import ImageOrder
from shared.errors import OverloadedError
from shared.logs import get_logger
from shared.messages import GenerateImage
from shared.records import JobRecord, Records, RequestRecord

_CANCEL_AGAIN_S = 0.5

log = get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """An order that the store has accepted, its requests in order, and what is known of them."""

    order: ImageOrder
    request_ids: tuple[str, ...]
    watch: Watch


class Generation:
    """The way from an order to its pictures.

    Args:
        records: The store; the caller owns its connection, as that of the others.
        board: News of requests.
        fleet_watch: What the scheduler says of its backlog.
        max_open: At most so many requests without a final state.
        limits: How long pictures may take to come.
    """

    def __init__(
        self,
        records: Records,
        board: EventBoard,
        fleet_watch: FleetWatch,
        *,
        max_open: int,
        limits: WaitLimits,
    ) -> None:
        self._records = records
        self._board = board
        self._fleet_watch = fleet_watch
        self._max_open = max_open
        self._limits = limits
        self._ledger = Ledger()
        self._abandoned: asyncio.Queue[str] = asyncio.Queue()

    @asynccontextmanager
    async def submitted(
        self, order: ImageOrder, *, job_id: str, owner: str
    ) -> AsyncIterator[Submission]:
        """Submit an order and watch it; on leaving, what has no final state is cancelled.

        Raises:
            OverloadedError: Too much work is ahead of it, or too many requests are open.
            RedisError: The store is full or does not answer.
        """
        job, requests = _make_job(order, job_id=job_id, owner=owner)
        with self._board.watch(job.request_ids) as watch:
            is_refused = False
            try:
                try:
                    with self._entering(order):
                        await self._records.submit(job, requests, max_open=self._max_open)
                except (OverloadedError, OutOfMemoryError):
                    is_refused = True
                    raise
                watch.is_armed = True
                yield Submission(order=order, request_ids=job.request_ids, watch=watch)
            finally:
                if not is_refused:
                    for request_id in watch.unfinished:
                        self._abandoned.put_nowait(request_id)

    @contextmanager
    def _entering(self, order: ImageOrder) -> Iterator[None]:
        """Check that an order's turn comes in time, and count it as work while it is submitted.

        While the scheduler does not know the model's capacity, the number of open requests alone
        bounds what is accepted.
        """
        capacities = self._fleet_watch.fleet.capacities
        model_id = order.model.model_id
        capacity = capacities.by_model.get(model_id)
        if capacity is None:
            yield
            return
        now = time.monotonic()
        work_s = order_work_s(order, capacity)
        accepted = self._ledger.since(model_id, capacities.written_at)
        check_admission(
            start_s=wait_s(capacity, capacities.written_at, accepted, now),
            work_s=work_s,
            deadline_ms=order.deadline_ms,
            limits=self._limits,
        )
        entry = self._ledger.add(model_id, work_s, now)
        try:
            yield
        except BaseException:
            self._ledger.withdraw(entry)
            raise
        self._ledger.confirm(entry, time.monotonic())

    async def wait(self, sent: Submission) -> list[RequestRecord]:
        """The records of the requests, in order, once all of them are done.

        Raises:
            ApiError: One of them, the first to do so, has failed, was cancelled or is lost.
        """
        done: dict[str, RequestRecord] = {}
        while True:
            for request_id in sent.request_ids:
                if request_id not in sent.watch.unfinished and request_id not in done:
                    done[request_id] = await self.read_done(request_id)
            if len(done) == len(sent.request_ids):
                return [done[request_id] for request_id in sent.request_ids]
            await sent.watch.changed()

    async def read_done(self, request_id: str) -> RequestRecord:
        """The record of a request that has a final state.

        Raises:
            ApiError: That state is not "done", or the store has lost the record.
        """
        record = await self._records.read(request_id)
        if record is None:
            raise unavailable(f"Request {request_id} was lost by the store.", code="request_lost")
        if record.state != "done":
            raise failure(record)
        return record

    async def read_image(self, record: RequestRecord) -> bytes:
        """The picture of a request that is done.

        Raises:
            ApiError: 410, it has expired or made room for newer ones.
        """
        image = await self._records.read_image(record)
        if image is None:
            raise ApiError(
                status=HTTPStatus.GONE,
                message=f"The image of {record.request_id} has expired.",
                code="image_expired",
            )
        return image

    async def run(self) -> None:
        """Cancel what has been abandoned, for ever; what the store does not take, again later."""
        while True:
            request_id = await self._abandoned.get()
            try:
                if await self._records.cancel(request_id, reason="Nobody waits for it any more."):
                    log.info("cancelled", request_id=request_id)
            except (RedisError, OSError) as error:
                log.warning("can't cancel yet", request_id=request_id, error=str(error))
                self._abandoned.put_nowait(request_id)
                await asyncio.sleep(_CANCEL_AGAIN_S)
            finally:
                self._abandoned.task_done()

    async def flush(self) -> None:
        """Wait until everything that was abandoned has been cancelled."""
        await self._abandoned.join()


def _make_job(
    order: ImageOrder, *, job_id: str, owner: str
) -> tuple[JobRecord, list[GenerateImage]]:
    requests = [
        GenerateImage(
            request_id=f"img_{secrets.token_hex(12)}",
            job_id=job_id,
            owner=owner,
            priority=order.priority,
            deadline_ms=order.deadline_ms,
            parameters=parameters,
        )
        for parameters in order.images
    ]
    ids = tuple(request.request_id for request in requests)
    return JobRecord(job_id=job_id, request_ids=ids, owner=owner), requests
