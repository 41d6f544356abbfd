from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray's use of pydantic
    from nvila.decode.proxy import leavable


class Source:
    """Streams like Serve's handler: it answers being closed with another message, and being cancelled in order."""

    def __init__(self, messages: int) -> None:
        self.messages = messages
        self.was_cancelled = False

    async def __call__(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        try:
            for number in range(self.messages):
                await asyncio.sleep(0)
                yield str(number).encode()
            if request == "endless":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
        yield b"status"


async def test_messages_come_in_order_and_to_the_end() -> None:
    stream = leavable(Source(3))("short", None)
    assert [message async for message in stream] == [b"0", b"1", b"2", b"status"]


@pytest.mark.parametrize("heard", [1, 2, 3])
async def test_a_reader_that_leaves_cancels_the_source(heard: int) -> None:
    source = Source(3)
    stream: Any = leavable(source)("endless", None)
    for _ in range(heard):
        await anext(stream)
    await stream.aclose()
    for _ in range(5):
        await asyncio.sleep(0)
    assert source.was_cancelled


async def test_what_the_source_raises_is_raised() -> None:
    async def broken(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        raise RuntimeError("broken")

    stream = leavable(broken)("", None)
    assert await anext(stream) == b"one"
    with pytest.raises(RuntimeError, match="broken"):
        await anext(stream)
