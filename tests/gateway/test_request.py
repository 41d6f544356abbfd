"""What a chat request may say: every OpenAI field, the media parts in all their spellings, the limits."""

from __future__ import annotations

import inspect
import json
from contextlib import closing, suppress
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import completion_create_params

from nvila.errors import ForbiddenURL, InvalidRequest, LimitExceeded, NotFound, NvilaError
from nvila.gateway import schema
from nvila.gateway.files import StoredFile
from nvila.gateway.parse import parse_chat, to_asked
from nvila.gateway.request import to_question
from nvila.types import MediaKind, Question, VideoSampling
from tests.gateway.faces import CARD, HELLO, LIMITS, video

FILE_ID = "file-" + "0" * 32


class _Files:
    async def get(self, tenant: str, file_id: str) -> StoredFile:
        if (tenant, file_id) != ("acme", FILE_ID):
            raise NotFound("there is no such file", param="file_id")
        return StoredFile(
            id=file_id,
            filename="a.png",
            purpose="vision",
            kind=MediaKind.IMAGE,
            size_bytes=1,
            digest="00" * 32,
            created_ns=0,
        )


async def _asked_question(raw: bytes, tenant: str = "acme") -> Question:
    return await to_question(to_asked(parse_chat(raw, LIMITS)), tenant, CARD, _Files(), LIMITS)


async def _question(*, tenant: str = "acme", **body: Any) -> Question:
    return await _asked_question(json.dumps({"messages": HELLO, **body}).encode(), tenant)


def _of(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(parts)}]


def test_every_field_of_openais_request_is_known_here() -> None:
    fields = get_type_hints(completion_create_params.CompletionCreateParamsBase) | {"stream": bool}
    assert set(fields) <= set(schema.ChatRequest.model_fields)


def test_every_ignored_field_is_documented() -> None:
    documented = inspect.getdoc(schema) or ""
    ignored = [
        name for name, field in schema.ChatRequest.model_fields.items() if field.description == "Accepted and ignored."
    ]
    assert len(ignored) > 5
    assert [name for name in ignored if f"`{name}`" not in documented] == []


@pytest.mark.parametrize(
    "body",
    [
        {"n": 1},
        {"n": None},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0},
        {"logprobs": False, "top_logprobs": None, "logit_bias": {}},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "reasoning_effort": "low"},
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "seed": -1, "max_tokens": 1},
        {"temperature": 2, "top_p": 0.01, "top_k": 50, "min_p": 1.0, "seed": 2**63 - 1, "max_tokens": 1024},
        {"temperature": None, "top_p": None, "seed": None, "max_tokens": None, "stop": None, "stream": None},
        {"max_tokens": 7, "max_completion_tokens": 7},
        {"stop": "a"},
        {"stop": ["a", "b", "c", "d"]},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream_options": None},
        {"model": "tiny"},
        {"timeout_s": 60},
    ],
)
async def test_accepted(body: dict[str, Any]) -> None:
    question = await _question(**body)
    assert question.sampling.max_tokens == (body.get("max_tokens") or 64)


async def test_the_smallest_nucleus_is_greedy() -> None:
    sampling = (await _question(temperature=1.5, top_p=0)).sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)


async def test_left_out_fields_mean_greedy_and_the_default_length() -> None:
    sampling = (await _question()).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.0, 1.0, 0, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", True),
        ("best_of", 3),
        ("frequency_penalty", 0.1),
        ("presence_penalty", -2),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"5": 1}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("prediction", {"type": "content"}),
        ("web_search_options", {}),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "0"),
        ("temperature", True),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.01),
        ("seed", 2**63),
        ("seed", 1.5),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", "5"),
        ("max_completion_tokens", [1]),
        ("stop", ""),
        ("stop", "x" * 257),
        ("stop", [1]),
        ("stream", "yes"),
        ("timeout_s", 0),
        ("timeout_s", 61),
        ("unknown_field", 1),
        ("messages", "hello"),
        ("messages", None),
        ("messages", []),
        ("media_io_kwargs", {"audio": {}}),
    ],
)
async def test_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await _question(**{field: value})
    assert caught.value.param is not None
    assert caught.value.param.split(".")[0] in (field, "max_tokens")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "timeout_s", "frequency_penalty", "seed"])
async def test_numbers_that_are_none_are_refused(field: str, number: str) -> None:
    raw = f'{{"messages": {json.dumps(HELLO)}, "{field}": {number}}}'.encode()
    with pytest.raises(InvalidRequest):
        await _asked_question(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": "\xc3\x28"}',
        b'{"messages": "\\ud800"}',
        b"[" * 10_000 + b"]" * 10_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_bodies_that_are_not_a_json_object_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_chat(raw, LIMITS)


@pytest.mark.parametrize(
    ("messages", "limit"),
    [
        (_of(*[video()] * 10_000), 8),
        (_of(*[{"type": "text", "text": ""}] * 10_000), 4096),
        (HELLO * 10_000, 64),
        (_of({"type": "text", "text": "x" * 10_001}), 10_000),
    ],
)
async def test_too_many_of_anything_is_refused_with_both_numbers(messages: list[Any], limit: int) -> None:
    with pytest.raises(LimitExceeded, match=f"at most {limit:,} allowed"):
        await _question(messages=messages)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": ""}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([*HELLO, {"role": "system", "content": "late"}, *HELLO], "messages[1].role"),
        ([{"role": "system", "content": [video()]}, *HELLO], "messages[0].content"),
        ([{"role": "assistant", "content": "x"}], "messages[0].role"),
        (_of({"type": "audio", "audio": {}}), "messages[0].content[0]"),
        (_of("plain"), "messages[0].content[0]"),
        (_of({"type": "text"}), "messages[0].content[0].text"),
        (_of({"type": "text", "text": 5}), "messages[0].content[0].text"),
        (_of({"type": "image_url", "image_url": "http://x/"}), "messages[0].content[0].image_url"),
        (_of({"type": "image_url", "image_url": {"url": None}}), "messages[0].content[0].image_url.url"),
        (_of({"type": "file", "file": {}}), "messages[0].content[0].file"),
        (_of(video(num_frames="8")), "messages[0].content[0].video_url.num_frames"),
        (_of({"type": "prompt_embeds", "data": "AAAA"}), "messages[0].content[0]"),
    ],
)
async def test_messages_that_make_no_sense_are_refused_at_the_field(messages: list[Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await _question(messages=messages)
    assert caught.value.param == param


async def test_media_alone_is_a_question() -> None:
    assert len((await _question(messages=_of(video()))).media) == 1


@pytest.mark.parametrize(
    ("part", "asked"),
    [
        (video(num_frames=8), VideoSampling(num_frames=8)),
        (video(fps=0.5), VideoSampling(fps=0.5)),
        ({**video(), "frames": 8}, VideoSampling(num_frames=8)),
        ({**video(), "fps": 2}, VideoSampling(fps=2)),
        ({**video(num_frames=8), "frames": 8}, VideoSampling(num_frames=8)),
        (
            {**video(), "media_info": {"type": "offset", "start_offset": 1, "end_offset": 5}},
            VideoSampling(num_frames=4, start_s=1, end_s=5),
        ),
        (
            {**video(), "videoMetadata": {"startOffset": "3s", "endOffset": "4.5s", "fps": 2}},
            VideoSampling(fps=2, start_s=3, end_s=4.5),
        ),
        ({**video(), "video_metadata": {"start_offset": "3s"}}, VideoSampling(num_frames=4, start_s=3)),
        (video(), VideoSampling(num_frames=4)),
        ({**video(), "uuid": "mine"}, VideoSampling(num_frames=4)),
    ],
)
async def test_frames_and_windows_in_every_spelling(part: dict[str, Any], asked: VideoSampling) -> None:
    question = await _question(messages=_of(part), media_io_kwargs={"video": {"num_frames": 4}})
    assert question.media[0].sampling == asked


@pytest.mark.parametrize(
    "part",
    [
        video(num_frames=8, fps=2),
        {**video(num_frames=8), "fps": 2},
        {**video(num_frames=8), "frames": 9},
        video(num_frames=0),
        video(num_frames=-1),
        video(num_frames=257),
        video(num_frames=8.5),
        video(fps=0),
        video(fps=-1),
        video(fps=1e9),
        video(start_s=5, end_s=1),
        video(start_s=5, end_s=5),
        video(start_s=-1),
        video(end_s=0),
        video(end_s=1e300),
        {**video(), "media_info": {"type": "timestamp", "start_timestamp": "2024-01-01T00:00:00Z"}},
        {**video(), "videoMetadata": {"startOffset": "3"}},
        {**video(), "videoMetadata": {"startOffset": "1h"}},
        {**video(start_s=1), "media_info": {"type": "offset", "start_offset": 2}},
    ],
)
async def test_contradictory_or_impossible_sampling_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        await _question(messages=_of(part))


@pytest.mark.parametrize("kwargs", [{"num_frames": 8, "fps": 1}, {"num_frames": -1}, {"num_frames": 0}, {"fps": 0}])
async def test_sampling_for_all_videos_is_held_to_the_same_rules(kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        await _question(messages=_of(video()), media_io_kwargs={"video": kwargs})


async def test_two_different_lengths_of_the_answer_contradict_each_other() -> None:
    with pytest.raises(InvalidRequest, match="differ"):
        await _question(max_tokens=5, max_completion_tokens=6)


async def test_stream_options_need_a_stream() -> None:
    with pytest.raises(InvalidRequest) as caught:
        await _question(stream_options={"include_usage": True})
    assert caught.value.param == "stream_options"


async def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(NotFound) as caught:
        await _question(model="gpt-4o")
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"file_id": FILE_ID}},
        {"type": "image_url", "image_url": {"url": FILE_ID}},
    ],
)
async def test_uploaded_files_are_asked_about_by_id(part: dict[str, Any]) -> None:
    (source,) = (await _question(messages=_of(part))).media
    assert (source.kind, source.file_id, source.url) == (MediaKind.IMAGE, FILE_ID, None)


async def test_another_tenants_file_is_not_there() -> None:
    with pytest.raises(NotFound) as caught:
        await _question(tenant="zeta", messages=_of(video(FILE_ID)))
    assert caught.value.param == "messages[0].content[0].video_url"


async def test_a_file_part_names_an_uploaded_file_and_nothing_else() -> None:
    with pytest.raises(InvalidRequest) as caught:
        await _question(messages=_of({"type": "file", "file": {"file_id": "https://example.com/a.jpg"}}))
    assert caught.value.param == "messages[0].content[0].file.file_id"


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "ftp://example.com/a.mp4",
        "rtsp://example.com/a",
        "concat:a|b",
        "subfile,,start,0,end,9,,:a",
        "/etc/passwd",
        "../a.mp4",
        "",
        "javascript:1",
    ],
)
async def test_only_http_data_and_file_ids_are_addresses(address: str) -> None:
    with pytest.raises(ForbiddenURL):
        await _question(messages=_of(video(address)))


async def test_an_endless_address_is_refused() -> None:
    with pytest.raises(LimitExceeded):
        await _question(messages=_of(video("http://example.com/" + "a" * 9000)))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = st.sampled_from(sorted(schema.ChatRequest.model_fields))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(_FIELDS, _JSON, max_size=4))
def test_whatever_a_field_holds_the_answer_is_a_question_or_a_typed_error(body: dict[str, Any]) -> None:
    raw = json.dumps({"messages": HELLO, **body}, allow_nan=True).encode()
    with suppress(NvilaError, StopIteration), closing(_asked_question(raw)) as work:
        work.send(None)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["type", "text", "image_url", "video_url", "file", "frames", "fps"]), _JSON))
def test_whatever_a_part_holds_it_is_understood_or_refused(part: dict[str, Any]) -> None:
    with suppress(NvilaError):
        to_asked(parse_chat(json.dumps({"messages": _of(part)}).encode(), LIMITS))
