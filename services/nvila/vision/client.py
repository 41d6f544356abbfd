"""The gateway's end of the vision leg: sends a chunk's frames to Triton, returns what became of them.

On one host frames stay where they were decoded: Triton maps the gateway's shared-memory region once, and a call names
a place in it (19 MB of 32 frames at 448²: 9 ms, against 100-200 ms through gRPC from Python). Elsewhere their bytes
travel. `auto` finds out by trying.

Light: NumPy and the Triton client. A dead Triton is `Unavailable` at once; trying again is the caller's business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from nvila.cache.codec import CorruptRecord, RecordFormat, unpack_payload
from nvila.errors import DeadlineExceeded, InvalidRequest, LimitExceeded, NvilaError, Overloaded, Unavailable, from_wire
from nvila.internal.v1 import vision_pb2
from nvila.telemetry import tracing
from nvila.telemetry.logs import fields
from nvila.types import Chunk, Deadline, Encoded, EncodeSettings, FrameLocation, Level, MediaKind, TokensRef
from nvila.vision.contract import ENCODE, FRAMES, MAX_MESSAGE_BYTES, MODEL, RESULT, EncodeCall, as_tensor

_log = logging.getLogger(__name__)

Transport = Literal["auto", "shared_memory", "grpc"]

_ENCODE_ROOM_BYTES = 1 << 20
"""Of a message, kept for everything that is not pixels."""

_CHANNEL = [
    # One name may stand for many servers (a headless service in Kubernetes): take turns, not the first one only.
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # After a restart of Triton, be back within a second; gRPC's own pauses grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Notice a partition: a ping each 10 s while calls are open (triton.py lets Triton accept them).
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(frozen=True)
class Readiness:
    """True in a condition when the service can encode; `reason` says why not."""

    is_ready: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.is_ready


class VisionClient:
    """One per process. `url`: host:port of Triton's gRPC service. `credentials`: for TLS; None: in the clear."""

    def __init__(
        self, url: str, *, transport: Transport = "auto", credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        self._triton = InferenceServerClient(url, channel_args=_CHANNEL, creds=credentials)
        self._regions = _Regions(self._triton, transport)

    async def close(self) -> None:
        """Let Triton unmap this process's regions, and hang up."""
        await self._regions.forget()
        await self._triton.close()

    async def ready(self) -> Readiness:
        """Whether the model is loaded and answers."""
        try:
            is_ready = await self._triton.is_model_ready(MODEL, client_timeout=2.0)
        except InferenceServerException as error:
            return Readiness(False, f"the vision service does not answer ({_status(error)})")
        return Readiness(is_ready, "" if is_ready else f"the vision service has not loaded {MODEL}")

    async def encode(
        self, chunk: Chunk, ref: TokensRef, settings: EncodeSettings, *, want_inline: bool, deadline: Deadline
    ) -> Encoded:
        """Encode a chunk and publish its tokens under `ref.key`.

        The answer has the tokens themselves when asked for or when they could not be published. Cancelling this
        cancels the work. Raises `Unavailable`, `Overloaded`, `DeadlineExceeded`, or what the service says is wrong.
        """
        call = EncodeCall(
            key=ref.key,
            settings=settings,
            want_inline=want_inline,
            timeout_s=deadline.left_s(),
            traceparent=tracing.current_traceparent(),
            times_s=chunk.times_s if settings.kind is MediaKind.VIDEO else (),
        )
        result = await self._infer(chunk, call, deadline)
        if result.error_code:
            raise from_wire(result.error_code, result.error_message, result.retry_after_s or None)
        return _encoded(result, ref, settings)

    async def _infer(self, chunk: Chunk, call: EncodeCall, deadline: Deadline) -> vision_pb2.EncodeResult:
        try:
            if await self._regions.offer(chunk.location, deadline):
                try:
                    return await self._call(self._regions.tensor(chunk), call, deadline)
                except InferenceServerException as error:
                    if _status(error) != "NOT_FOUND":
                        raise
                # Triton was restarted and has forgotten the region: tell it again, once.
                self._regions.was_lost()
                if await self._regions.offer(chunk.location, deadline):
                    return await self._call(self._regions.tensor(chunk), call, deadline)
            return await self._call(_bytes_tensor(chunk), call, deadline)
        except InferenceServerException as error:
            if _status(error) == "UNAVAILABLE":
                self._regions.was_lost()
            raise _translated(error) from None

    async def _call(self, frames: InferInput, call: EncodeCall, deadline: Deadline) -> vision_pb2.EncodeResult:
        encode = call.to_bytes()
        encode_tensor = InferInput(ENCODE, [len(encode)], "UINT8")
        encode_tensor.set_data_from_numpy(as_tensor(encode))
        answer = await self._triton.infer(
            MODEL,
            [frames, encode_tensor],
            outputs=[InferRequestedOutput(RESULT)],
            client_timeout=deadline.left_s(),
            # For Triton's own spans, which it makes for whoever sends this, sampled or not.
            headers={"traceparent": call.traceparent} if tracing.is_sampled() else None,
        )
        tensor: NDArray[np.uint8] | None = answer.as_numpy(RESULT)
        try:
            return vision_pb2.EncodeResult.FromString(b"" if tensor is None else tensor.tobytes())
        except DecodeError:
            raise Unavailable("the vision service's answer cannot be parsed") from None


class _Regions:
    """Which shared-memory regions Triton has mapped for this process, by their names."""

    def __init__(self, triton: InferenceServerClient, transport: Transport) -> None:
        self._triton = triton
        self._transport = transport
        self._registered: set[str] = set()
        self._refused: dict[str, float] = {}
        self._lock = asyncio.Lock()

    async def offer(self, location: FrameLocation | None, deadline: Deadline) -> bool:
        """Whether Triton can read the place, after telling it about the region if need be."""
        if self._transport == "grpc" or location is None:
            if self._transport == "shared_memory":
                raise InvalidRequest("transport shared_memory: the chunk is not in shared memory")
            return False
        async with self._lock:
            if location.region in self._registered:
                return True
            if self._transport == "auto" and time.monotonic() < self._refused.get(location.region, 0):
                return False
            return await self._register(location, deadline)

    def tensor(self, chunk: Chunk) -> InferInput:
        assert chunk.location is not None
        tensor = InferInput(FRAMES, list(chunk.frames_FHWC.shape), "UINT8")
        tensor.set_shared_memory(_name(chunk.location), chunk.frames_FHWC.nbytes, chunk.location.offset)
        return tensor

    def was_lost(self) -> None:
        """Triton went away, and what it had mapped with it."""
        self._registered.clear()
        self._refused.clear()

    async def forget(self) -> None:
        for region in list(self._registered):
            try:
                await self._triton.unregister_system_shared_memory(region.lstrip("/"), client_timeout=1.0)
            except InferenceServerException:
                return  # it is gone, and its mappings with it
        self._registered.clear()

    async def _register(self, location: FrameLocation, deadline: Deadline) -> bool:
        left_s = min(5.0, deadline.left_s())
        try:
            await self._triton.register_system_shared_memory(
                _name(location), location.region, location.region_bytes, client_timeout=left_s
            )
        except InferenceServerException as error:
            status = _status(error)
            if status in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                raise
            if status != "ALREADY_EXISTS":  # it cannot open it: another host, or another /dev/shm
                if self._transport == "shared_memory":
                    raise
                self._refused[location.region] = time.monotonic() + 60
                _log.info("vision cannot map our memory, frames travel by gRPC", extra=fields(status=status))
                return False
        self._registered.add(location.region)
        await self._unmap_dead(location, left_s)
        return True

    async def _unmap_dead(self, location: FrameLocation, left_s: float) -> None:
        """Let Triton, which has the same /dev/shm, unmap regions like ours whose gateway was killed, to free memory."""
        family = _name(location).rpartition("-")[0]
        status = await self._triton.get_system_shared_memory_status(client_timeout=left_s)
        for name in status.regions:
            if name.rpartition("-")[0] == family and not Path("/dev/shm", name).exists():
                await self._triton.unregister_system_shared_memory(name, client_timeout=left_s)


def _name(location: FrameLocation) -> str:
    return location.region.lstrip("/")


def _bytes_tensor(chunk: Chunk) -> InferInput:
    limit = MAX_MESSAGE_BYTES - _ENCODE_ROOM_BYTES
    if chunk.frames_FHWC.nbytes > limit:
        raise LimitExceeded.of("bytes of pixels", asked=chunk.frames_FHWC.nbytes, limit=limit)
    tensor = InferInput(FRAMES, list(chunk.frames_FHWC.shape), "UINT8")
    tensor.set_data_from_numpy(chunk.frames_FHWC)
    return tensor


def _encoded(result: vision_pb2.EncodeResult, ref: TokensRef, settings: EncodeSettings) -> Encoded:
    manifest = result.manifest
    levels = tuple(Level(level.blocks, level.tokens) for level in manifest.levels)
    if manifest.key != ref.key or levels != ref.levels:
        raise NvilaError(f"vision made {levels} of a chunk that was to be {ref.levels}: the services disagree")
    inline = None
    if result.inline_payload:
        form = RecordFormat(width=manifest.width, dtype=settings.token_dtype, vision_revision=settings.vision_revision)
        try:
            inline = unpack_payload(manifest, result.inline_payload, ref, form)
        except CorruptRecord as error:
            raise Unavailable(f"the vision service's tokens are not usable: {error}") from None
    return Encoded(
        ref=ref,
        is_published=result.is_published,
        inline=inline,
        tiles=result.tiles,
        stage_ms=dict(result.stage_ms),
    )


def _status(error: InferenceServerException) -> str:
    return str(error.status() or "").removeprefix("StatusCode.")


def _translated(error: InferenceServerException) -> NvilaError:
    """Triton's own words may name regions or addresses, so they go to the log and not to the caller."""
    status = _status(error)
    _log.warning("a vision call failed", extra=fields(status=status, message=str(error.message())))
    match status:
        case "DEADLINE_EXCEEDED":
            return DeadlineExceeded("the request's time is up: vision did not answer in time")
        case "RESOURCE_EXHAUSTED":
            return Overloaded("the vision service takes no more requests")
        case "INVALID_ARGUMENT":
            return InvalidRequest("the vision service refused the frames' shape, type or place")
        case _:
            return Unavailable(f"the vision service does not answer ({status or 'no status'})")
