"""Permits and the queue before them."""

from __future__ import annotations

import asyncio

import pytest

from nvila.errors import Overloaded, Unavailable
from nvila.gateway.admission import Admission


async def _hold(admission: Admission, until: asyncio.Event, done: list[int], number: int) -> None:
    async with admission.permit():
        done.append(number)
        await until.wait()


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_those_who_wait_get_their_turn_in_order() -> None:
    admission, go, done = Admission(permits=1, queue=3, wait_s=5), asyncio.Event(), list[int]()
    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(_hold(admission, go, done, number))
        await _settle()
        assert (done, admission.running, admission.waiting) == ([0], 1, 3)
        with pytest.raises(Overloaded) as caught:
            async with admission.permit():
                pass
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s >= 1
        go.set()
    assert done == [0, 1, 2, 3]
    assert (admission.running, admission.waiting) == (0, 0)


async def test_a_wait_that_takes_too_long_is_overload() -> None:
    admission, go = Admission(permits=1, queue=1, wait_s=0.05), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_hold(admission, go, [], 0))
        await _settle()
        with pytest.raises(Overloaded, match=r"no turn came in 0\.05 s"):
            async with admission.permit():
                pass
        go.set()


async def test_a_failure_or_a_cancelled_wait_gives_everything_back() -> None:
    admission, go = Admission(permits=1, queue=1, wait_s=5), asyncio.Event()
    with pytest.raises(ValueError, match="inside"):
        async with admission.permit():
            raise ValueError("inside")
    holding = asyncio.create_task(_hold(admission, go, [], 0))
    waiting = asyncio.create_task(_hold(admission, go, [], 1))
    await _settle()
    waiting.cancel()
    await asyncio.wait({waiting})
    assert (admission.running, admission.waiting) == (1, 0)
    go.set()
    await holding
    async with asyncio.timeout(1), admission.permit():
        pass


async def test_once_closed_nobody_is_admitted_not_even_those_who_waited_and_the_rest_drains() -> None:
    admission, go, done = Admission(permits=1, queue=1, wait_s=5), asyncio.Event(), list[int]()
    holding = asyncio.create_task(_hold(admission, go, done, 0))
    waiting = asyncio.create_task(_hold(admission, go, done, 1))
    await _settle()
    admission.close()
    with pytest.raises(Unavailable):
        async with admission.permit():
            pass
    assert not await admission.drain(0.01)
    go.set()
    assert await admission.drain(1)
    await holding
    with pytest.raises(Unavailable):
        await waiting
    assert done == [0]
