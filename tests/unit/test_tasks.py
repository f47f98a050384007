from __future__ import annotations

import asyncio

import pytest

from shared.tasks import TaskGroup, end_tasks

WAIT_S = 20.0


async def deaf_to(num_cancellations: int) -> None:
    """Sleep on through so many cancellations, as a client's command that loses them."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            num_cancellations -= 1
            if num_cancellations < 0:
                raise


async def fail() -> None:
    await asyncio.sleep(0.01)
    raise ValueError


async def test_a_task_that_loses_cancellations_is_ended() -> None:
    deaf = asyncio.create_task(deaf_to(2))
    await asyncio.sleep(0)
    await asyncio.wait_for(end_tasks([deaf]), WAIT_S)
    assert deaf.cancelled()


async def test_a_task_that_fails_while_it_is_ended_is_no_matter() -> None:
    async def fail_when_cancelled() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            raise ValueError

    failing = asyncio.create_task(fail_when_cancelled())
    await asyncio.sleep(0)
    await asyncio.wait_for(end_tasks([failing]), WAIT_S)
    assert failing.done()


async def test_a_group_ends_though_a_member_loses_the_cancellation() -> None:
    async def run() -> None:
        async with TaskGroup() as tasks:
            tasks.create_task(deaf_to(1))
            tasks.create_task(fail())

    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(run(), WAIT_S)
    assert [type(error) for error in caught.value.exceptions] == [ValueError]


async def test_a_group_ends_though_its_body_fails_beside_such_a_member() -> None:
    async def run() -> None:
        async with TaskGroup() as tasks:
            tasks.create_task(deaf_to(1))
            await fail()

    with pytest.raises(ExceptionGroup):
        await asyncio.wait_for(run(), WAIT_S)
