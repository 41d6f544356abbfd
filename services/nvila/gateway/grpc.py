"""The gRPC face: the server with health and reflection, and `nvila.api.v1.ChatService`. Protobuf objects stop here."""

from __future__ import annotations

import base64
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from nvila.api.v1 import chat_pb2 as pb
from nvila.api.v1.chat_pb2_grpc import ChatServiceServicer, add_ChatServiceServicer_to_server
from nvila.api.v1.recordings_pb2_grpc import add_RecordingServiceServicer_to_server
from nvila.errors import InvalidRequest, Unauthenticated
from nvila.gateway.admission import Admission
from nvila.gateway.auth import ApiKeys
from nvila.gateway.front import Front, answer_id, in_time
from nvila.gateway.grpc_call import answering
from nvila.gateway.grpc_recordings import SERVICE as RECORDING_SERVICE
from nvila.gateway.grpc_recordings import RecordingService
from nvila.gateway.recordings import Recordings
from nvila.gateway.request import Asked, AskedMedia, AskedMessage, RequestLimits, check_counts
from nvila.model.config import NvilaConfig
from nvila.types import (
    Answered,
    Coverage,
    FinishReason,
    MediaCoverage,
    MediaKind,
    RecordingCoverage,
    RecordingWindow,
    Role,
    VideoSampling,
)

_log = logging.getLogger(__name__)

SERVICE: str = pb.DESCRIPTOR.services_by_name["ChatService"].full_name
_HEALTH_PREFIX = f"/{health.SERVICE_NAME}/"

_ROLES = {pb.ROLE_SYSTEM: Role.SYSTEM, pb.ROLE_USER: Role.USER, pb.ROLE_ASSISTANT: Role.ASSISTANT}
_REASONS = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}


@dataclass(frozen=True, kw_only=True)
class GrpcServer:
    """A running server. `port`: the one it listens on."""

    server: grpc.aio.Server
    port: int
    health: health.aio.HealthServicer

    async def show_ready(self, is_ready: bool) -> None:
        """What the standard health service answers, for the whole server and for each of our services."""
        status = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE, RECORDING_SERVICE):
            await self.health.set(service, status)

    async def stop(self, drain_s: float) -> None:
        await self.health.enter_graceful_shutdown()
        await self.server.stop(drain_s)


async def serve(
    front: Front,
    recordings: Recordings | None,
    streams: Admission,
    keys: ApiKeys,
    address: str,
    *,
    max_message_bytes: int,
) -> GrpcServer:
    """Listen on `address` (host:port; port 0 for a free one). Raises `OSError` when it cannot be had."""
    server = grpc.aio.server(
        interceptors=[_KeyNeeded(keys)],
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_concurrent_streams", 100),
            ("grpc.so_reuseport", 0),
        ],
    )
    add_ChatServiceServicer_to_server(ChatService(front, keys), server)  # type: ignore[no-untyped-call]
    add_RecordingServiceServicer_to_server(RecordingService(recordings, keys, streams), server)  # type: ignore[no-untyped-call]
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    services = (SERVICE, RECORDING_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(services, server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address} for gRPC") from error
    await server.start()
    started = GrpcServer(server=server, port=port, health=checks)
    await started.show_ready(False)
    return started


class ChatService(ChatServiceServicer):
    def __init__(self, front: Front, keys: ApiKeys) -> None:
        self._front = front
        self._keys = keys

    async def Chat(self, request: pb.ChatRequest, context: grpc.aio.ServicerContext) -> None:
        """Not a generator: a cancelled one would be closed only when it is collected."""
        async with answering(context, self._keys, SERVICE, "Chat") as tenant, self._front.admitted("grpc"):
            asked = to_asked(request, context.time_remaining(), self._front.limits)
            question, card = await self._front.question(asked, tenant)
            started = pb.Started(id=answer_id(question), model=card.name)
            await context.write(pb.ChatResponse(started=started))
            async with (
                in_time(question.deadline),
                aclosing(self._front.answer(question, card, is_stream=True)) as events,
            ):
                async for event in events:
                    if isinstance(event, Answered):
                        await context.write(pb.ChatResponse(finished=_finished(event)))
                    else:
                        await context.write(pb.ChatResponse(delta=pb.Delta(text=event.text)))

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        async with answering(context, self._keys, SERVICE, "ListModels"):
            card = await self._front.card()
            config = NvilaConfig.from_json(card.config_json)
            model = pb.Model(
                id=card.name,
                max_model_len=card.max_model_len,
                max_frames=min(self._front.limits.frames, config.max_frames),
                is_random=card.is_random,
            )
            return pb.ListModelsResponse(models=[model])


class _KeyNeeded(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses every call without a valid key, reflection included; only health is open."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        if not details.method.startswith(_HEALTH_PREFIX):
            given = dict(details.invocation_metadata or ()).get("authorization")
            try:
                self._keys.tenant(given)
            except Unauthenticated as error:
                return _refusal(error.message)
        return await continuation(details)


def _refusal(message: str) -> grpc.RpcMethodHandler:
    """A handler of the most general kind, which serves calls of every kind."""

    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message, (("nvila-error", Unauthenticated.code),))

    return grpc.stream_stream_rpc_method_handler(refuse)


# -- from protobuf


def to_asked(request: pb.ChatRequest, left_s: float | None, limits: RequestLimits) -> Asked:
    """`left_s`: of the call's deadline, None without one; cut to the limit, because it is a bound on the client's own
    patience and not a wish. Raises `InvalidRequest`."""
    parts = sum(len(message.parts) for message in request.messages[: limits.messages])
    check_counts(messages=len(request.messages), parts=parts, media=0, limits=limits)
    sampling = request.sampling
    return Asked(
        model=request.model,
        messages=tuple(_message(message, f"messages[{index}]") for index, message in enumerate(request.messages)),
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        temperature=sampling.temperature if sampling.HasField("temperature") else None,
        top_p=sampling.top_p if sampling.HasField("top_p") else None,
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        seed=sampling.seed % 2**63 if sampling.HasField("seed") else None,
        stop=tuple(sampling.stop),
        timeout_s=None if left_s is None else min(left_s, limits.timeout_s),
    )


def _message(message: pb.Message, param: str) -> AskedMessage:
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(f"{param}.role: {message.role} is not a role", param=f"{param}.role")
    parts = tuple(_part(part, f"{param}.parts[{index}]") for index, part in enumerate(message.parts))
    return AskedMessage(param=param, role=role, parts=parts)


def _part(part: pb.Part, param: str) -> str | AskedMedia:
    match part.WhichOneof("part"):
        case "text":
            return part.text
        case "image":
            address = _address(part.image, MediaKind.IMAGE, f"{param}.image")
            return AskedMedia(param=f"{param}.image", kind=MediaKind.IMAGE, address=address)
        case "video":
            address = _address(part.video, MediaKind.VIDEO, f"{param}.video")
            sampling = _video_sampling(part.video.sampling)
            return AskedMedia(param=f"{param}.video", kind=MediaKind.VIDEO, address=address, sampling=sampling)
        case "recording":
            window = _recording_window(part.recording)
            return AskedMedia(param=f"{param}.recording", kind=MediaKind.VIDEO, recording=window)
    raise InvalidRequest(f"{param}: one of text, image, video and recording is needed", param=param)


def _recording_window(asked: pb.RecordingStretch) -> RecordingWindow:
    return RecordingWindow(
        recording_id=asked.recording_id,
        start_s=asked.start_s if asked.HasField("start_s") else None,
        end_s=asked.end_s if asked.HasField("end_s") else None,
        start_at=asked.start_at_s if asked.HasField("start_at_s") else None,
        end_at=asked.end_at_s if asked.HasField("end_at_s") else None,
    )


def _address(media: pb.Image | pb.Video, kind: MediaKind, param: str) -> str:
    match media.WhichOneof("source"):
        case "url":
            return str(media.url)
        case "file_id":
            return str(media.file_id)
        case "data":
            return f"data:{kind}/*;base64,{base64.b64encode(media.data).decode()}"
    raise InvalidRequest(f"{param}: one of url, file_id and data is needed", param=param)


def _video_sampling(sampling: pb.VideoSampling) -> VideoSampling:
    return VideoSampling(
        num_frames=sampling.num_frames if sampling.HasField("num_frames") else None,
        fps=sampling.fps if sampling.HasField("fps") else None,
        start_s=sampling.start_s if sampling.HasField("start_s") else None,
        end_s=sampling.end_s if sampling.HasField("end_s") else None,
    )


# -- to protobuf


def _finished(answered: Answered) -> pb.Finished:
    usage = answered.usage
    return pb.Finished(
        reason=_REASONS[answered.reason],
        usage=pb.Usage(
            text_tokens=usage.text,
            image_tokens=usage.image,
            video_tokens=usage.video,
            completion_tokens=answered.completion_tokens,
            cached_tokens=usage.cached,
        ),
        coverage=_coverage(answered.coverage),
    )


def _coverage(coverage: Coverage) -> pb.Coverage:
    return pb.Coverage(media=[_media_coverage(media) for media in coverage.media], stage_ms=dict(coverage.stage_ms))


def _media_coverage(media: MediaCoverage) -> pb.MediaCoverage:
    return pb.MediaCoverage(
        kind=media.kind,
        frames_asked=media.frames_asked,
        frames_decoded=media.frames_decoded,
        frames_encoded=media.frames_encoded,
        frames_reused=media.frames_reused,
        frames_dropped=media.frames_dropped,
        frames_padded=media.frames_padded,
        start_s=media.start_s,
        end_s=media.end_s,
        gaps=[pb.Gap(start_s=gap.start_s, end_s=gap.end_s, reason=gap.reason) for gap in media.gaps],
        tokens=media.tokens,
        chunks=media.chunks,
        cache_hits=media.cache_hits,
        tiles=media.tiles,
        recording=None if media.recording is None else _recording_coverage(media.recording),
    )


def _recording_coverage(coverage: RecordingCoverage) -> pb.RecordingCoverage:
    return pb.RecordingCoverage(
        recording_id=coverage.recording_id,
        start_s=coverage.start_s,
        end_s=coverage.end_s,
        captured_from_s=coverage.captured_from,
        captured_to_s=coverage.captured_to,
        frames_static=coverage.frames_static,
        frames_left_out=coverage.frames_left_out,
        chunks=coverage.chunks,
        plan=pb.WindowPlan(**asdict(coverage.plan)),
    )
