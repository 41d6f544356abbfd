"""The gRPC face: the same answers, errors and permits as over HTTP."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from nvila.api.v1 import chat_pb2 as pb
from nvila.api.v1.chat_pb2_grpc import ChatServiceStub
from nvila.errors import (
    DeadlineExceeded,
    ForbiddenURL,
    InvalidMedia,
    LimitExceeded,
    MediaUnavailable,
    NotFound,
    NvilaError,
    Overloaded,
    Unavailable,
)
from nvila.types import MediaKind
from tests.gateway.faces import COVERAGE, KEY, PAUSE, Gateway, ScriptedPipeline, serving

METADATA = (("authorization", f"Bearer {KEY}"),)


@asynccontextmanager
async def _stub(gateway: Gateway) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(gateway.grpc_target) as channel:
        yield ChatServiceStub(channel)  # type: ignore[no-untyped-call]


def _request(*parts: pb.Part, **sampling: Any) -> pb.ChatRequest:
    message = pb.Message(role=pb.ROLE_USER, parts=parts or [pb.Part(text="Hello")])
    return pb.ChatRequest(messages=[message], sampling=pb.Sampling(**sampling))


async def _fails(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    error: grpc.aio.AioRpcError = caught.value
    return error


async def test_an_answer_is_started_deltas_and_finished_with_usage_and_coverage(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway, _stub(gateway) as stub:
        events = [event async for event in stub.Chat(_request(), metadata=METADATA)]
        assert await gateway.outcomes() == {"ok": 1}
    assert [event.WhichOneof("event") for event in events] == ["started", "delta", "delta", "delta", "finished"]
    assert events[0].started.model == "tiny"
    assert events[0].started.id.startswith("chatcmpl-")
    assert "".join(event.delta.text for event in events) == "A cat."
    finished = events[-1].finished
    assert finished.reason == pb.FINISH_REASON_STOP
    assert (finished.usage.text_tokens, finished.usage.video_tokens, finished.usage.cached_tokens) == (20, 2056, 5)
    (media,) = finished.coverage.media
    for name in ("frames_asked", "frames_decoded", "frames_dropped", "frames_padded", "tokens", "chunks", "tiles"):
        assert getattr(media, name) == getattr(COVERAGE.media[0], name)
    assert media.gaps[0].reason == "2 frames could not be decoded"
    assert finished.coverage.stage_ms["total"] == 99.0


async def test_parts_sampling_and_deadline_reach_the_pipeline_as_over_http(tmp_path: Path) -> None:
    parts = [
        pb.Part(image=pb.Image(data=b"bytes")),
        pb.Part(video=pb.Video(url="http://example.com/a", sampling=pb.VideoSampling(fps=2, start_s=0))),
        pb.Part(text="What?"),
    ]
    sampling = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 2**64 - 1, "stop": ["x"]}
    async with serving(tmp_path) as gateway, _stub(gateway) as stub:
        async for _ in stub.Chat(_request(*parts, **sampling), metadata=METADATA, timeout=20):
            pass
        (question,) = gateway.pipeline.questions
    assert question.tenant == "acme"
    image, video = question.media
    assert image.url is not None
    assert base64.b64decode(image.url.partition(",")[2]) == b"bytes"
    assert (video.kind, video.sampling.fps, video.sampling.start_s) == (MediaKind.VIDEO, 2, 0)
    asked = question.sampling
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.top_k, asked.stop) == (5, 0.5, 0.9, 3, ("x",))
    assert asked.seed == 2**63 - 1
    assert 10 < question.deadline.left_s() < 20


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidMedia("bad"), grpc.StatusCode.INVALID_ARGUMENT),
        (MediaUnavailable("its host is away"), grpc.StatusCode.FAILED_PRECONDITION),
        (LimitExceeded.of("frames", asked=257, limit=256, param="messages"), grpc.StatusCode.INVALID_ARGUMENT),
        (ForbiddenURL("inside"), grpc.StatusCode.PERMISSION_DENIED),
        (NotFound("no such file"), grpc.StatusCode.NOT_FOUND),
        (Overloaded("full", retry_after_s=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("away"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (NvilaError("odd"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_each_error_has_its_status_and_its_code(
    tmp_path: Path, error: NvilaError, status: grpc.StatusCode
) -> None:
    async with serving(tmp_path, ScriptedPipeline([error])) as gateway, _stub(gateway) as stub:
        failed = await _fails(stub.Chat(_request(), metadata=METADATA))
        assert await gateway.outcomes() == {error.code: 1}
    assert failed.code() is status
    assert failed.details() == error.message
    trailing = dict(tuple(failed.trailing_metadata() or ()))
    assert trailing["nvila-error"] == error.code
    assert trailing.get("retry-after-s") == ("2.5" if isinstance(error, Overloaded) else None)


async def test_one_line_is_logged_per_call_with_tenant_and_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="nvila")
    pipeline = ScriptedPipeline(["A ", Unavailable("at 10.0.0.7")])
    async with serving(tmp_path, pipeline) as gateway, _stub(gateway) as stub:
        await stub.ListModels(pb.ListModelsRequest(), metadata=METADATA)
        await _fails(stub.Chat(_request(), metadata=METADATA))
        pipeline.script = [PAUSE]
        left = stub.Chat(_request(), metadata=METADATA)
        await pipeline.pauses.wait()
        left.cancel()
        await gateway.outcomes()
    lines = [record.__dict__["fields"] for record in caplog.records if record.message == "request"]
    assert [(line["path"], line["status"], line["tenant"], line.get("code")) for line in lines] == [
        ("/nvila.api.v1.ChatService/ListModels", "OK", "acme", None),
        ("/nvila.api.v1.ChatService/Chat", "UNAVAILABLE", "acme", "unavailable"),
        ("/nvila.api.v1.ChatService/Chat", "CANCELLED", "acme", "cancelled"),
    ]
    assert "10.0.0.7" not in str(lines)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (pb.ChatRequest(), "messages"),
        (pb.ChatRequest(messages=[pb.Message(parts=[pb.Part(text="x")])]), "messages[0].role"),
        (_request(pb.Part()), "messages[0].parts[0]"),
        (_request(pb.Part(image=pb.Image())), "messages[0].parts[0].image"),
        (_request(pb.Part(video=pb.Video(url="file:///a"))), "messages[0].parts[0].video"),
        (_request(pb.Part(image=pb.Image(file_id="x"))), "messages[0].parts[0].image"),
        (
            _request(pb.Part(video=pb.Video(url="http://a/", sampling=pb.VideoSampling(fps=1, num_frames=1)))),
            "messages[0].parts[0].video",
        ),
        (
            _request(pb.Part(video=pb.Video(url="http://a/", sampling=pb.VideoSampling(fps=float("nan"))))),
            "messages[0].parts[0].video",
        ),
        (_request(*[pb.Part(text="")] * 5000), "messages"),
        (pb.ChatRequest(messages=[pb.Message()] * 5000), "messages"),
        (_request(temperature=float("nan")), "temperature"),
        (_request(temperature=2.5), "temperature"),
        (_request(top_p=1.5), "top_p"),
        (_request(max_tokens=0), "max_tokens"),
    ],
)
async def test_requests_that_make_no_sense_are_refused_at_the_field(
    tmp_path: Path, request_: pb.ChatRequest, param: str
) -> None:
    async with serving(tmp_path) as gateway, _stub(gateway) as stub:
        failed = await _fails(stub.Chat(request_, metadata=METADATA))
        assert gateway.pipeline.questions == []
    assert dict(tuple(failed.trailing_metadata() or ()))["nvila-param"] == param


async def test_a_message_over_the_limit_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway, _stub(gateway) as stub:
        request = _request(pb.Part(image=pb.Image(data=bytes(2 << 20))))
        failed = await _fails(stub.Chat(request, metadata=METADATA))
    assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def _listed(call: Any) -> AsyncIterator[Any]:
    yield await call


async def _refusal(make_call: Callable[[], Any]) -> grpc.aio.AioRpcError:
    """A call is refused before its message is read; one that is still sending is told so by its own library, in these
    words, and has to ask again to hear why."""
    for _ in range(20):
        error = await _fails(make_call())
        if error.details() != "Internal error from Core":
            break
    return error


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer no-such-key"),), (("authorization", KEY),)])
async def test_every_call_but_health_needs_a_valid_key(tmp_path: Path, metadata: tuple[tuple[str, str], ...]) -> None:
    async with serving(tmp_path) as gateway, grpc.aio.insecure_channel(gateway.grpc_target) as channel:
        stub: Any = ChatServiceStub(channel)  # type: ignore[no-untyped-call]
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        calls: list[Callable[[], Any]] = [
            lambda: stub.Chat(_request(), metadata=metadata),
            lambda: reflection.ServerReflectionInfo(iter([listing]), metadata=metadata),
            lambda: _listed(stub.ListModels(pb.ListModelsRequest(), metadata=metadata)),
        ]
        for call in calls:
            assert (await _refusal(call)).code() is grpc.StatusCode.UNAUTHENTICATED
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), metadata=metadata)
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_models_are_listed_with_their_limits(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway, _stub(gateway) as stub:
        (model,) = (await stub.ListModels(pb.ListModelsRequest(), metadata=METADATA)).models
    assert (model.id, model.max_model_len, model.max_frames, model.is_random) == ("tiny", 16384, 256, True)


async def test_reflection_names_the_service(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway, grpc.aio.insecure_channel(gateway.grpc_target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([asked]), metadata=METADATA):
            names = {service.name for service in answer.list_services_response.service}
    assert "nvila.api.v1.ChatService" in names


@pytest.mark.parametrize("script", [[PAUSE], ["A ", PAUSE]])
async def test_a_cancelled_call_stops_the_work_and_gives_its_permit_back(tmp_path: Path, script: list[Any]) -> None:
    pipeline = ScriptedPipeline(script)
    async with serving(tmp_path, pipeline) as gateway, _stub(gateway) as stub:
        call = stub.Chat(_request(), metadata=METADATA)
        async with asyncio.timeout(30):
            await pipeline.pauses.wait()
            call.cancel()
            await pipeline.stopped.wait()
        assert await gateway.outcomes() == {"cancelled": 1}


async def test_a_calls_deadline_ends_the_work(tmp_path: Path) -> None:
    pipeline = ScriptedPipeline([PAUSE])
    async with serving(tmp_path, pipeline) as gateway, _stub(gateway) as stub:
        failed = await _fails(stub.Chat(_request(), metadata=METADATA, timeout=1))
        assert failed.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(30):
            await pipeline.stopped.wait()
        assert set(await gateway.outcomes()) <= {"cancelled", "deadline_exceeded"}
