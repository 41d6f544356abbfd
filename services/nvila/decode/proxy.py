"""Runs inside Ray Serve's gRPC proxy, and mends two things there: a client that leaves always stops the work, and calls
may come over TLS.

Serve's own handler (Ray 2.60, `ray/serve/_private/proxy.py`) cancels the replica's task only if the client leaves while
the handler waits for the next message. If it leaves while a message is being sent, `send_request_to_replica` answers
the `GeneratorExit` with another message, Python raises "async generator ignored GeneratorExit", and the replica
generates to the end for nobody: 6 of 30 times when we tried (compare ANCHORS P47). Here Serve's handler is read by a
task of its own, which always waits for the next message: what is read lies in a queue, which an answer's length bounds.

Serve speaks TLS only where all of Ray does (`RAY_USE_TLS`), with a certificate for each node's address. Here its server
gets a second port, with one certificate for the service's name; on the first, which Serve has opened by then, our calls
are refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from ray.serve.exceptions import RequestCancelledError

from nvila.decode.settings import ProxySettings
from nvila.internal.v1.decode_pb2_grpc import add_DecodeServiceServicer_to_server

Handler = Callable[[Any, Any], AsyncIterator[bytes]]
Unary = Callable[[Any, Any], Awaitable[Any]]


def add_servicer(servicer: Any, server: Any) -> None:
    """For `grpc_servicer_functions`: as the generated function, with streams that can be left at any time, and over TLS
    where a certificate is set."""
    _quiet_cancellations(asyncio.get_running_loop())
    settings = ProxySettings()
    if settings.tls_dir is not None:
        server.add_secure_port(f"[::]:{settings.tls_port}", _credentials(settings.tls_dir))
    original = server.service_handler_factory

    def factory(*, service_method: str, streaming_type: Any) -> Any:
        handler = original(service_method=service_method, streaming_type=streaming_type)
        is_stream = streaming_type.value == "unary_stream"
        if settings.tls_dir is not None:
            handler = _tls_only_stream(handler) if is_stream else _tls_only(handler)
        return leavable(handler) if is_stream else handler

    server.service_handler_factory = factory
    try:
        add_DecodeServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    finally:
        server.service_handler_factory = original


def leavable(handler: Handler) -> Handler:
    """The same stream, whose source is cancelled, not closed, when its reader leaves."""

    async def unary_stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        messages: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def read() -> None:
            async for message in handler(request, context):
                messages.put_nowait(message)

        reading = asyncio.create_task(read())
        reading.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            await reading
        finally:
            reading.cancel()

    return unary_stream


def _credentials(folder: Path) -> grpc.ServerCredentials:
    authority, certificate, key = ((folder / name).read_bytes() for name in ("ca.crt", "tls.crt", "tls.key"))
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)


def _tls_only(handler: Unary) -> Unary:
    async def unary(request: Any, context: Any) -> Any:
        await _check_tls(context)
        return await handler(request, context)

    return unary


def _tls_only_stream(handler: Handler) -> Handler:
    async def unary_stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        await _check_tls(context)
        async for message in handler(request, context):
            yield message

    return unary_stream


async def _check_tls(context: Any) -> None:
    if context.auth_context().get("transport_security_type") != [b"ssl"]:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this service is called over TLS, on another port")


def _quiet_cancellations(loop: asyncio.AbstractEventLoop) -> None:
    """Serve leaves a task of each cancelled call unread, and the loop would log a stack trace for it."""
    others = loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception"), RequestCancelledError):
            return
        if others is None:
            loop.default_exception_handler(context)
        else:
            others(loop, context)

    loop.set_exception_handler(handle)
