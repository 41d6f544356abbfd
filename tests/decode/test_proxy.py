from __future__ import annotations

import asyncio
import socket
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from nvila.gateway.tls import channel_credentials
from nvila.internal.v1 import decode_pb2 as pb
from nvila.internal.v1.decode_pb2_grpc import DecodeServiceServicer, DecodeServiceStub
from tests.certificates import make_certificate

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray's use of pydantic
    from ray.serve._private.grpc_util import gRPCGenericServer

    from nvila.decode.proxy import add_servicer, leavable


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


# -- over TLS


@asynccontextmanager
async def a_proxy() -> AsyncIterator[int]:
    """Serve's own gRPC server, with handlers that answer at once. Yields its port in the clear."""

    async def describe(request: Any, context: Any) -> bytes:
        return pb.DescribeResponse(name="a model").SerializeToString()

    async def generate(request: Any, context: Any) -> AsyncIterator[bytes]:
        for number in range(3):
            yield pb.GenerateEvent(delta=pb.TextDelta(text=str(number))).SerializeToString()

    def factory(*, service_method: str, streaming_type: Any) -> Any:
        return generate if streaming_type.value == "unary_stream" else describe

    server = gRPCGenericServer(factory)
    port = server.add_insecure_port("127.0.0.1:0")
    add_servicer(DecodeServiceServicer(), server)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def answers(channel: grpc.aio.Channel) -> tuple[str, str]:
    """What Describe and Generate say, or the status that they end with."""
    stub: Any = DecodeServiceStub(channel)  # type: ignore[no-untyped-call]
    said = []
    for call in (_described, _generated):
        try:
            said.append(await call(stub))
        except grpc.aio.AioRpcError as error:
            said.append(error.code().name)
    await channel.close()
    return said[0], said[1]


async def _described(stub: Any) -> str:
    return str((await stub.Describe(pb.DescribeRequest(), timeout=10)).name)


async def _generated(stub: Any) -> str:
    return "".join([event.delta.text async for event in stub.Generate(pb.GenerateRequest(), timeout=10)])


async def test_without_a_certificate_calls_come_in_the_clear() -> None:
    async with a_proxy() as port:
        assert await answers(grpc.aio.insecure_channel(f"127.0.0.1:{port}")) == ("a model", "012")


async def test_with_a_certificate_calls_come_over_tls_from_who_has_one_and_not_otherwise(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, strangers = (make_certificate(tmp_path_factory.mktemp(name)) for name in ("ours", "strangers"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        tls_port = probe.getsockname()[1]
    monkeypatch.setenv("NVILA_DECODE_TLS_DIR", str(ours))
    monkeypatch.setenv("NVILA_DECODE_TLS_PORT", str(tls_port))
    target = f"127.0.0.1:{tls_port}"
    without = grpc.ssl_channel_credentials((ours / "ca.crt").read_bytes())
    (strangers / "ca.crt").write_bytes((ours / "ca.crt").read_bytes())
    async with a_proxy() as port:
        assert await answers(grpc.aio.secure_channel(target, _of(ours))) == ("a model", "012")
        assert await answers(grpc.aio.secure_channel(target, without)) == ("UNAVAILABLE",) * 2
        assert await answers(grpc.aio.secure_channel(target, _of(strangers))) == ("UNAVAILABLE",) * 2
        assert await answers(grpc.aio.insecure_channel(target)) == ("UNAVAILABLE",) * 2
        assert await answers(grpc.aio.insecure_channel(f"127.0.0.1:{port}")) == ("UNAUTHENTICATED",) * 2


def _of(folder: Path) -> grpc.ChannelCredentials:
    credentials = channel_credentials(folder)
    assert credentials is not None
    return credentials
