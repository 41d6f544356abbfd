"""Parts die during requests. Every request is answered rightly, or ends with a typed error; then all is well again.

These run last: each leaves the stack whole, but restarts take a while.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import httpx
import openai
import psutil
import pytest
import redis.asyncio as redis

from nvila.cli.lifecycle import RunningStack
from nvila.cli.stack import redis_url
from tests.clips import BIKES, BUNNY
from tests.e2e.asking import Answer, ask, data_url, image_part, messages, picture, picture_url, video_part


def part_pid(stack: RunningStack, part: str) -> int:
    state = stack.folder.read()
    assert state is not None
    process = state.parts[part].process
    assert process is not None
    return process.pid


def replica_pids(stack: RunningStack) -> list[int]:
    """The Ray workers that hold an engine."""
    below = psutil.Process(part_pid(stack, "decode")).children(recursive=True)
    return [child.pid for child in below if "ServeReplica" in " ".join(child.cmdline()[:1])]


async def until_ready(http: httpx.AsyncClient, within_s: float = 120) -> None:
    async with asyncio.timeout(within_s):
        while True:
            try:
                if (await http.get("/health/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.25)


async def while_asking(
    ask_one: Callable[[int], Coroutine[Any, Any, Answer]], count: int, harm: Callable[[], Awaitable[None]]
) -> list[Answer | BaseException]:
    """Outcomes of `count` questions asked together, with `harm` done while they are on their way."""
    asked = [asyncio.create_task(ask_one(number)) for number in range(count)]
    await asyncio.sleep(0.3)
    await harm()
    return await asyncio.gather(*asked, return_exceptions=True)


def check_conserved(outcomes: list[Answer | BaseException], expected: list[str]) -> int:
    """Each outcome is the right answer or a typed error of ours; returns how many were answered."""
    answered = 0
    for outcome, text in zip(outcomes, expected, strict=True):
        if isinstance(outcome, Answer):
            assert outcome.text == text
            assert outcome.finish_reason
            answered += 1
        else:
            assert isinstance(outcome, openai.APIError), repr(outcome)
            assert outcome.code in {"unavailable", "overloaded", "deadline_exceeded"}, repr(outcome)
    return answered


async def test_killing_redis_during_requests_costs_time_but_no_answer(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, stack: RunningStack
) -> None:
    def question(number: int) -> list[dict[str, Any]]:
        return messages(video_part(data_url(BIKES), num_frames=64, start_s=0.05 * number))

    expected = [(await ask(client, question(number))).text for number in range(3)]

    async def kill() -> None:
        os.kill(part_pid(stack, "cache"), signal.SIGKILL)

    outcomes = await while_asking(lambda number: ask(client, question(number)), 3, kill)
    assert check_conserved(outcomes, expected) == 3
    after = await ask(client, question(0))
    assert after.text == expected[0]
    await until_ready(http)


async def test_tokens_evicted_between_encode_and_decode_are_made_again(
    client: openai.AsyncOpenAI, stack: RunningStack
) -> None:
    asked = messages(video_part(data_url(BUNNY), num_frames=64))
    expected = (await ask(client, asked)).text
    is_over = asyncio.Event()

    async def evict() -> None:
        async with redis.Redis.from_url(redis_url(stack.config)) as connection:
            while not is_over.is_set():
                shards = [name async for name in connection.scan_iter(match="nvila:*:s*", count=1000)]
                if shards:
                    await connection.unlink(*shards)
                await asyncio.sleep(0.005)

    eviction = asyncio.create_task(evict())
    answer = await ask(client, asked)
    is_over.set()
    await eviction
    assert answer.text == expected
    assert answer.coverage["media"][0]["frames_encoded"] > 0


async def test_killing_triton_during_requests_loses_no_request(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, stack: RunningStack
) -> None:
    def question(number: int) -> list[dict[str, Any]]:
        return messages(image_part(picture_url(picture(300 + number, 200, seed=50 + number))))

    warm = messages(image_part(picture_url(picture(300, 200, seed=40))))
    expected_warm = (await ask(client, warm)).text

    async def kill() -> None:
        os.kill(part_pid(stack, "vision"), signal.SIGKILL)

    asked = [asyncio.create_task(ask(client, question(number))) for number in range(4)]
    await kill()
    cached = await ask(client, warm)
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert cached.text == expected_warm, "what is in the cache needs no vision service"
    await until_ready(http)
    expected = [(await ask(client, question(number))).text for number in range(4)]
    assert check_conserved(outcomes, expected) >= 1


async def test_killing_a_decode_replica_in_mid_stream_ends_every_request_properly(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, stack: RunningStack
) -> None:
    def question(number: int) -> list[dict[str, Any]]:
        return messages(image_part(picture_url(picture(200, 100 + number, seed=70 + number))))

    options = {"max_tokens": 200}
    expected = [(await ask(client, question(number), **options)).text for number in range(3)]

    async def kill() -> None:
        pids = replica_pids(stack)
        assert pids, "no decode replica found"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    outcomes = await while_asking(lambda number: ask(client, question(number), **options), 3, kill)
    check_conserved(outcomes, expected)
    await until_ready(http)
    async with asyncio.timeout(120):
        while True:
            try:
                again = await ask(client, question(0), **options)
                break
            except openai.InternalServerError:
                await asyncio.sleep(1)
    assert again.text == expected[0]


async def test_a_decode_service_whose_ray_node_was_killed_starts_anew(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, stack: RunningStack
) -> None:
    question = messages(image_part(picture_url(picture(210, 110, seed=80))))
    expected = (await ask(client, question)).text
    before = part_pid(stack, "decode")
    (raylet,) = (child for child in psutil.Process(before).children() if child.name() == "raylet")

    raylet.kill()

    async with asyncio.timeout(180):
        while True:
            state = stack.folder.read()
            if state is not None and state.parts["decode"].restarts and state.parts["decode"].phase == "ready":
                break
            await asyncio.sleep(0.25)
        await until_ready(http)
    assert part_pid(stack, "decode") != before
    assert (await ask(client, question)).text == expected


async def test_nothing_is_left_in_flight_after_all_that(http: httpx.AsyncClient) -> None:
    metrics = (await http.get("/metrics")).text
    assert "nvila_requests_in_flight 0.0" in metrics
    assert "nvila_frame_memory_bytes 0.0" in metrics


@pytest.fixture(autouse=True)
async def _whole_before(http: httpx.AsyncClient) -> None:
    await until_ready(http)
