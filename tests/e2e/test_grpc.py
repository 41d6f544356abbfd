"""The gRPC face gives the answers of the HTTP face."""

from __future__ import annotations

import grpc
import grpc.aio
import openai
import pytest

from nvila.api.v1 import chat_pb2, chat_pb2_grpc
from nvila.cli.lifecycle import RunningStack
from tests.clips import CARPHONE
from tests.e2e.asking import TOKENS, ask, data_url, messages, video_part


async def test_a_video_question_over_grpc_is_answered_as_over_http(
    client: openai.AsyncOpenAI, stack: RunningStack
) -> None:
    over_http = await ask(client, messages(video_part(data_url(CARPHONE), num_frames=16)))
    request = chat_pb2.ChatRequest(
        messages=[
            chat_pb2.Message(
                role=chat_pb2.ROLE_USER,
                parts=[
                    chat_pb2.Part(
                        video=chat_pb2.Video(data=CARPHONE.read_bytes(), sampling=chat_pb2.VideoSampling(num_frames=16))
                    ),
                    chat_pb2.Part(text="What happens here?"),
                ],
            )
        ],
        sampling=chat_pb2.Sampling(max_tokens=TOKENS),
    )
    target = f"127.0.0.1:{stack.config.ports.gateway_grpc}"
    options = [("grpc.max_send_message_length", 64 << 20)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub = chat_pb2_grpc.ChatServiceStub(channel)  # type: ignore[no-untyped-call]
        metadata = [("authorization", f"Bearer {stack.config.api_key}")]
        events = [event async for event in stub.Chat(request, metadata=metadata, timeout=60)]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListModels(chat_pb2.ListModelsRequest())
    assert [events[0].WhichOneof("event"), events[-1].WhichOneof("event")] == ["started", "finished"]
    assert "".join(event.delta.text for event in events) == over_http.text
    assert events[-1].finished.usage.video_tokens == over_http.coverage["media"][0]["tokens"]
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
