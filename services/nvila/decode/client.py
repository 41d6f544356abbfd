"""Calls the decode service through Ray Serve's gRPC proxy. The light end: no torch, no Ray.

Whatever breaks on the way is one of our errors: what the service says itself (`Failed` events) as it was, a full queue
as `Overloaded`, a dead replica or proxy as `Unavailable`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from nvila.decode import wire
from nvila.errors import DeadlineExceeded, LimitExceeded, NvilaError, Overloaded, Unavailable
from nvila.internal.v1 import decode_pb2 as pb
from nvila.internal.v1.decode_pb2_grpc import DecodeServiceStub
from nvila.telemetry import tracing
from nvila.types import DecodeEvent, Finished, GenerateRequest, ModelCard, TokensMissing

MAX_MESSAGE_BYTES = 512 << 20
"""Explicit, because gRPC's default is 4 MB (ANCHORS P45). Inline tokens of 256 frames of the 15B model are 168 MB in
float32. Serve's proxy takes up to 2 GB."""

_DESCRIBE_TIMEOUT_S = 5.0
_RETRY_AFTER_S = 1.0
_GRACE_S = 0.5


class DecodeClient:
    """One process's connection to the decode service. Make it inside a running event loop; `close` it."""

    def __init__(
        self,
        target: str,
        *,
        app: str = "decode",
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """`target`: host:port of Serve's gRPC proxy. `app`: the Serve application's name. `credentials`: for TLS; None:
        in the clear."""
        options = [
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.keepalive_time_ms", 30_000),
            # A service that restarts is found again within a second, not after gRPC's back-off of two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
        ]
        self._channel = (
            grpc.aio.insecure_channel(target, options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options)
        )
        self._stub: Any = DecodeServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._app = app

    async def close(self) -> None:
        await self._channel.close()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[DecodeEvent, None]:
        """The events of one generation. Leaving the iterator cancels the work behind it.

        Raises what `Failed` says, `Overloaded`, `Unavailable`, `DeadlineExceeded`.
        """
        metadata = [("application", self._app), ("request_id", request.request_id)]
        if request.affinity:
            metadata.append(("session_id", request.affinity))
        message = wire.request_to_proto(request)
        # A little longer than the service has, so that what it says about the deadline arrives.
        call = self._stub.Generate(message, metadata=metadata, timeout=request.deadline.left_s() + _GRACE_S)
        try:
            async for answer in call:
                event = wire.event_from_proto(answer)
                yield event
                if isinstance(event, Finished | TokensMissing):
                    return
        except grpc.aio.AioRpcError as error:
            raise _as_ours(error) from error
        except asyncio.CancelledError:
            if call.cancelled() and not _is_being_cancelled():
                raise Unavailable("the decode service cancelled the generation") from None
            raise
        finally:
            call.cancel()
        raise Unavailable("the decode service ended the stream without an answer")

    async def describe(self, *, timeout_s: float = _DESCRIBE_TIMEOUT_S) -> ModelCard:
        """What is served. Raises `Unavailable` until a replica is up."""
        try:
            answer = await self._stub.Describe(
                pb.DescribeRequest(), metadata=[("application", self._app)], timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"the decode service does not answer: {error.code().name}") from error
        return wire.card_from_proto(answer)

    async def embed(self, text: str, *, timeout_s: float = _DESCRIBE_TIMEOUT_S) -> NDArray[np.float32]:
        """A text in the space of the language model's input embeddings: (width,) of unit length.

        Raises what the service says is wrong with it, `Overloaded`, `Unavailable`, `DeadlineExceeded`.
        """
        request_id = uuid.uuid4().hex
        message = pb.EmbedRequest(request_id=request_id, text=text, traceparent=tracing.current_traceparent())
        metadata = [("application", self._app), ("request_id", request_id)]
        try:
            answer = await self._stub.Embed(message, metadata=metadata, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _as_ours(error) from error
        return wire.vector_from_proto(answer)

    async def ready(self) -> bool:
        """A replica answers."""
        try:
            await self.describe()
        except NvilaError:
            return False
        return True


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _as_ours(error: grpc.aio.AioRpcError) -> NvilaError:
    """Serve's status codes. Its messages hold stack traces and addresses, so ours do not repeat them."""
    match error.code():
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in (error.details() or ""):
            return LimitExceeded(
                "the request and its inline tokens are larger than a message to the decode service may be"
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded("the decode service's queue is full", retry_after_s=_RETRY_AFTER_S)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded("the request's time is up")
        case code:
            return Unavailable(f"the decode service broke off: {code.name}")
