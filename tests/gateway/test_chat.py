"""The chat route as clients see it: the official client, raw server-sent events, errors, clients that leave."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from nvila.errors import InvalidMedia, LimitExceeded, MediaUnavailable, NvilaError, Overloaded, Unavailable
from nvila.gateway.admission import Admission
from tests.gateway.faces import ANSWERED, BEARER, COVERAGE, HELLO, KEY, PAUSE, Gateway, ScriptedPipeline, serving, video


def _openai(gateway: Gateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0)


async def _events(gateway: Gateway, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, which must end with [DONE]."""
    response = await gateway.ask(stream=True, **body)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


async def test_the_openai_client_gets_an_answer_with_usage_by_modality_and_coverage(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway, _openai(gateway) as client:
        answer = await client.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == "A cat."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2076, 3, 2079)
    details = answer.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == 5
    assert details.model_extra is not None
    assert details.model_extra["video_tokens"] == 2056
    assert answer.model_extra is not None
    assert answer.model_extra["coverage"]["media"][0]["gaps"][0]["reason"] == "2 frames could not be decoded"


async def test_numbers_of_the_coverage_end_at_the_microsecond(tmp_path: Path) -> None:
    gap = replace(COVERAGE.media[0].gaps[0], start_s=1.4000000000000001, end_s=0.1 + 0.2)
    media = (replace(COVERAGE.media[0], gaps=(gap,), end_s=6.3000000000000007),)
    coverage = replace(COVERAGE, media=media, stage_ms={"video": 1 / 3})
    pipeline = ScriptedPipeline(script=("A cat.", replace(ANSWERED, coverage=coverage)))
    async with serving(tmp_path, pipeline) as gateway:
        whole = (await gateway.ask()).json()["coverage"]
        streamed = (await _events(gateway))[-1]["coverage"]
    assert whole == streamed
    (item,) = whole["media"]
    assert (item["gaps"][0]["start_s"], item["gaps"][0]["end_s"], item["end_s"]) == (1.4, 0.3, 6.3)
    assert whole["stage_ms"] == {"video": 0.333333}


@pytest.mark.parametrize("has_usage", [False, True])
async def test_the_openai_client_streams_and_finds_coverage_on_the_last_chunk(tmp_path: Path, has_usage: bool) -> None:
    async with serving(tmp_path) as gateway, _openai(gateway) as client:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            stream=True,
            stream_options={"include_usage": has_usage},
        )
        chunks = [chunk async for chunk in stream]
    text = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert text == ["", "A ", "cat", ".", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None] * 4 + ["stop"]
    last = chunks[-1]
    assert last.model_extra is not None
    assert last.model_extra["coverage"]["stage_ms"]["total"] == 99.0
    assert bool(last.choices) is not has_usage
    assert (last.usage is not None) is has_usage
    assert all(chunk.model_extra is None or "coverage" not in chunk.model_extra for chunk in chunks[:-1])


async def test_with_usage_asked_for_every_other_chunk_says_usage_null(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        *others, last = await _events(gateway, stream_options={"include_usage": True})
        plain = await _events(gateway)
    assert all(chunk["usage"] is None for chunk in others)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"]["video_tokens"] == 2056
    assert all("usage" not in chunk for chunk in plain)
    assert len({chunk["id"] for chunk in plain}) == 1


async def test_an_answer_without_any_text_is_still_a_whole_stream(tmp_path: Path) -> None:
    async with serving(tmp_path, ScriptedPipeline(["", ANSWERED])) as gateway:
        chunks = await _events(gateway)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {}]


async def test_line_separators_in_the_answer_do_not_split_events(tmp_path: Path) -> None:
    async with serving(tmp_path, ScriptedPipeline(["a\u2028b\x85c\nd\re", ANSWERED])) as gateway:
        _, chunk, _ = await _events(gateway)
    assert chunk["choices"][0]["delta"]["content"] == "a\u2028b\x85c\nd\re"


async def test_a_silent_stream_sends_comments_that_the_openai_client_ignores(tmp_path: Path) -> None:
    pipeline = ScriptedPipeline([PAUSE, "late", ANSWERED])
    async with serving(tmp_path, pipeline, heartbeat_s=0.02) as gateway:
        body = {"messages": HELLO, "stream": True}
        async with gateway.client.stream("POST", "/v1/chat/completions", json=body, headers=BEARER) as response:
            lines = response.aiter_lines()
            seen = [line async for line in _until(lines, ": still working")]
            pipeline.go.set()
            rest = [line async for line in lines]
        assert seen[-1] == ": still working"
        assert any('"late"' in line for line in rest)
        pipeline.go.clear()
        async with _openai(gateway) as client:
            stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
            pipeline.go.set()
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "late"


async def _until(lines: Any, wanted: str) -> Any:
    async for line in lines:
        yield line
        if line == wanted:
            return


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidMedia("no frames", param="messages"), 422, "invalid_request_error"),
        (LimitExceeded.of("frames", asked=257, limit=256), 413, "invalid_request_error"),
        (Overloaded("queue full", retry_after_s=2.5), 429, "rate_limit_error"),
        (Unavailable("vision is away"), 503, "server_error"),
        (MediaUnavailable("its host answered 503", param="url"), 424, "invalid_request_error"),
        (NvilaError("odd"), 500, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_text_has_its_status_streamed_or_not(
    tmp_path: Path, error: NvilaError, status: int, kind: str, stream: bool
) -> None:
    async with serving(tmp_path, ScriptedPipeline([error])) as gateway:
        response = await gateway.ask(stream=stream)
        assert await gateway.outcomes() == {error.code: 1}
    assert response.status_code == status
    assert response.json()["error"] == {
        "message": error.message,
        "type": kind,
        "param": error.param,
        "code": error.code,
    }
    if status in (424, 429, 503):
        assert int(response.headers["retry-after"]) == (3 if status == 429 else 1)


async def test_an_error_in_the_middle_of_a_stream_is_an_event_that_the_openai_client_raises(tmp_path: Path) -> None:
    async with serving(tmp_path, ScriptedPipeline(["A ", Unavailable("decode died")])) as gateway:
        response = await gateway.ask(stream=True)
        async with _openai(gateway) as client:
            stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
            with pytest.raises(openai.APIError, match="decode died"):
                async for _ in stream:
                    pass
        assert await gateway.outcomes() == {"unavailable": 2}
    assert response.status_code == 200
    assert "[DONE]" not in response.text
    assert '"code":"unavailable"' in response.text.splitlines()[-2]


async def test_an_error_that_nobody_expected_tells_the_client_nothing_about_the_inside(tmp_path: Path) -> None:
    async with serving(tmp_path, ScriptedPipeline([1])) as gateway:  # an int is no event
        response = await gateway.ask()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "int" not in response.json()["error"]["message"].split()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[PAUSE, ANSWERED], ["A ", PAUSE, ANSWERED]])
async def test_a_client_that_leaves_stops_the_work_and_gives_its_permit_back(
    tmp_path: Path, stream: bool, script: list[Any]
) -> None:
    pipeline = ScriptedPipeline(script)
    async with serving(tmp_path, pipeline) as gateway:
        asking = asyncio.create_task(gateway.ask(stream=stream))
        async with asyncio.timeout(30):
            await pipeline.pauses.wait()
            assert gateway.admission.running == 1
            asking.cancel()
            await pipeline.stopped.wait()
        assert await gateway.outcomes() == {"cancelled": 1}


async def test_time_that_runs_out_is_a_504_and_in_a_stream_an_event(tmp_path: Path) -> None:
    async with serving(tmp_path, ScriptedPipeline(["A ", PAUSE])) as gateway:
        response = await gateway.ask(timeout_s=0.1)
        streamed = await gateway.ask(timeout_s=0.1, stream=True)
        assert await gateway.outcomes() == {"deadline_exceeded": 2}
    assert response.status_code == 504
    assert '"deadline_exceeded"' in streamed.text


async def test_beyond_permits_and_queue_requests_are_refused_with_retry_after(tmp_path: Path) -> None:
    pipeline = ScriptedPipeline([PAUSE, ANSWERED])
    async with serving(tmp_path, pipeline, admission=Admission(permits=1, queue=1, wait_s=5)) as gateway:
        first = asyncio.create_task(gateway.ask())
        await pipeline.pauses.wait()
        second = asyncio.create_task(gateway.ask())
        while not gateway.admission.waiting:
            await asyncio.sleep(0.001)
        refused = await gateway.ask()
        pipeline.go.set()
        assert (await first).status_code == (await second).status_code == 200
        assert await gateway.outcomes() == {"ok": 2, "overloaded": 1}
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1


async def test_many_concurrent_requests_each_get_their_own_answer_and_id(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        answers = await asyncio.gather(*(gateway.ask() for _ in range(16)))
    assert len({answer.json()["id"] for answer in answers}) == 16


async def test_request_id_and_trace_context_come_back(tmp_path: Path) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with serving(tmp_path) as gateway:
        headers = {**BEARER, "x-request-id": "mine-1", "traceparent": traceparent}
        named = await gateway.client.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers)
        odd = {**BEARER, "x-request-id": "a b", "traceparent": "nonsense"}
        other = await gateway.client.post("/v1/chat/completions", json={"messages": HELLO}, headers=odd)
    assert named.headers["x-request-id"] == "mine-1"
    assert named.headers["traceparent"].split("-")[1] == traceparent.split("-")[1]
    assert other.headers["x-request-id"] not in ("", "a b")


async def test_media_keep_their_order_and_their_own_sampling(tmp_path: Path) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "high"}}
    content = [
        picture,
        {"type": "text", "text": "and"},
        video(num_frames=16, start_s=1, end_s=2.5),
        video("http://example.com/b.mp4"),
        {"type": "text", "text": "?"},
    ]
    async with serving(tmp_path) as gateway:
        response = await gateway.ask(
            messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}],
            media_io_kwargs={"video": {"fps": 2}},
        )
        assert response.status_code == 200, response.text
        (question,) = gateway.pipeline.questions
    assert question.tenant == "acme"
    assert [source.kind for source in question.media] == ["image", "video", "video"]
    first, second = question.media[1].sampling, question.media[2].sampling
    assert (first.num_frames, first.fps, first.start_s, first.end_s) == (16, None, 1, 2.5)
    assert (second.num_frames, second.fps) == (None, 2)
    assert [getattr(part, "index", None) for part in question.messages[1].parts] == [0, None, 1, 2, None]
