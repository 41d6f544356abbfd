"""One `POST /v1/chat/completions`, from its first byte to its last.

It is a response that does the work itself while it is sent, because a permit, a span and a time limit must last exactly
as long as the answer does, and because a client that leaves must stop the work at once, streamed or not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nvila.errors import Cancelled, DeadlineExceeded, NvilaError
from nvila.gateway.front import Front, answer_id, in_time
from nvila.gateway.http_errors import note_code, note_failure, to_object
from nvila.gateway.parse import parse_chat, to_asked
from nvila.gateway.replies import HEARTBEAT, Reply, error_event
from nvila.types import Answered, ModelCard, Question

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
]
_ERROR_WRITE_S = 1.0

Headers = list[tuple[bytes, bytes]]


class ChatResponse(Response):
    """`body_s`: time for the request's body to arrive. `heartbeat_s`: silence after which a comment is sent."""

    def __init__(self, front: Front, tenant: str, *, body_s: float, heartbeat_s: float = 10.0) -> None:
        self._front = front
        self._tenant = tenant
        self._body_s = body_s
        self._heartbeat_s = heartbeat_s
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = _Sent(send)
        try:
            async with self._front.admitted("http"):
                chat = parse_chat(await _read(receive, self._body_s), self._front.limits)
                question, card = await self._front.question(to_asked(chat), self._tenant)
                reply = Reply(
                    id=answer_id(question),
                    created=int(time.time()),
                    model=card.name,
                    fingerprint=f"nvila-{card.vision_revision[:12]}",
                    has_usage=chat.stream_options is not None and bool(chat.stream_options.include_usage),
                )
                work = self._stream if chat.stream else self._whole
                await _unless_left(receive, work(question, card, reply, sent), sent)
        except NvilaError as error:
            if not sent.has_begun:
                raise
            note_code(scope, error.code)

    async def _whole(self, question: Question, card: ModelCard, reply: Reply, sent: _Sent) -> None:
        text: list[str] = []
        async with in_time(question.deadline), aclosing(self._front.answer(question, card, is_stream=False)) as events:
            async for event in events:
                if isinstance(event, Answered):
                    body = reply.whole("".join(text), event).model_dump_json().encode()
                    await sent.write([(b"content-type", b"application/json")], body, is_last=True)
                else:
                    text.append(event.text)

    async def _stream(self, question: Question, card: ModelCard, reply: Reply, sent: _Sent) -> None:
        stream = _EventStream(sent, reply.first())
        try:
            async with (
                in_time(question.deadline),
                stream.beating(self._heartbeat_s),
                aclosing(self._front.answer(question, card, is_stream=True)) as events,
            ):
                async for event in events:
                    if isinstance(event, Answered):
                        await stream.write(reply.last(event), is_last=True)
                    else:
                        await stream.write(reply.delta(event.text))
        except NvilaError as error:
            if sent.has_begun and not sent.is_over:
                note_failure(error)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_ERROR_WRITE_S):
                        await stream.write(error_event(to_object(error)), is_last=True)
            raise


class _Sent:
    """What of a response was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False
        self.is_over = False

    async def write(self, headers: Headers, data: bytes, *, is_last: bool) -> None:
        """`headers` go before the first data."""
        if not self.has_begun:
            self.has_begun = True
            if is_last:
                headers = [*headers, (b"content-length", b"%d" % len(data))]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self.is_over = is_last
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})


class _EventStream:
    """Server-sent events that begin with the first thing written: until then an error can still have a status."""

    def __init__(self, sent: _Sent, first: bytes) -> None:
        self._sent = sent
        self._first = first
        self._turn = asyncio.Lock()
        self._written_at = time.monotonic()

    async def write(self, data: bytes, *, is_last: bool = False) -> None:
        async with self._turn:
            data, self._first = self._first + data, b""
            self._written_at = time.monotonic()
            await self._sent.write(_SSE_HEADERS, data, is_last=is_last)

    @asynccontextmanager
    async def beating(self, every_s: float) -> AsyncIterator[None]:
        """Send a comment whenever nothing was sent for `every_s`: proxies close connections that look dead."""
        beat = asyncio.create_task(self._beat(every_s))
        try:
            yield
        finally:
            beat.cancel()
            await asyncio.wait({beat})

    async def _beat(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._written_at + every_s - time.monotonic()))
            if time.monotonic() - self._written_at >= every_s:
                await self.write(HEARTBEAT)


async def _read(receive: Receive, within_s: float) -> bytes:
    """The whole body. Its size was bounded by the middleware."""
    parts = []
    try:
        async with asyncio.timeout(within_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Cancelled("the client left")
                parts.append(message.get("body", b""))
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise DeadlineExceeded(f"the body did not arrive whole in {within_s:g} s") from None


async def _unless_left(receive: Receive, work: Awaitable[None], sent: _Sent) -> None:
    """Do `work`, but stop it when the client leaves. (A server calls it leaving, too, when all was sent.)"""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and not sent.is_over:
            raise Cancelled("the client left")
        await working
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
