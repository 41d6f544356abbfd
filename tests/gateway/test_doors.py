"""What every request passes: keys on every route, bounds on every body, health and metrics, routes that are none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from nvila.errors import InvalidMedia, Unavailable
from nvila.gateway.auth import ApiKeys
from nvila.gateway.middleware import OPEN_PATHS
from tests.gateway.faces import ANSWERED, BEARER, HELLO, KEY, ScriptedPipeline, serving

_BAD_KEYS = [
    None,
    "",
    KEY,
    "Bearer",
    f"Basic {KEY}",
    f"Bearer {KEY}x",
    f"Bearer {KEY[:-1]}",
    f"Bearer {KEY}:acme",
    "Bearer " + "k" * 10_000,
    "Bearer \u00e9",
]


@pytest.mark.parametrize("authorization", _BAD_KEYS, ids=lambda value: repr(value)[:30])
async def test_every_route_but_health_needs_a_valid_key(tmp_path: Path, authorization: str | None) -> None:
    headers = {} if authorization is None else {b"Authorization": authorization.encode("latin-1")}
    async with serving(tmp_path) as gateway:
        for method, path in [
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/estimate"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/tiny"),
            ("POST", "/v1/files"),
            ("GET", "/v1/files"),
            ("GET", "/v1/files/file-1"),
            ("DELETE", "/v1/files/file-1"),
            ("GET", "/v1/files/file-1/content"),
            ("GET", "/metrics"),
            ("GET", "/docs"),
            ("GET", "/openapi.json"),
            ("GET", "/nothing"),
            ("GET", "/health/"),
            ("GET", "/Health"),
            ("GET", "//health"),
            ("OPTIONS", "/v1/models"),
            ("POST", "/v1/recordings"),
            ("POST", "/v1/recordings/rec_0/frames"),
            ("GET", "/v1/recordings/rec_0/media?signature=0&tenant=acme&expires=99999999999"),
            ("POST", "/v1/jobs"),
            ("GET", "/v1/jobs/job_0/events"),
            ("OPTIONS", "/v1/uploads"),
            ("POST", "/"),
            ("GET", "/console"),
            ("GET", "//console/app.js"),
        ]:
            response = await gateway.client.request(method, f"{gateway.url}{path}", headers=headers)
            assert (response.status_code, path) == (401, path)
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert response.json()["error"]["code"] == "unauthenticated"
        for path in OPEN_PATHS:
            assert (await gateway.client.get(path, headers=headers)).status_code == 200


def test_a_key_leads_to_its_tenant() -> None:
    keys = ApiKeys(["key-number-1", "key-number-2:blue"])
    assert keys.tenant("Bearer key-number-1") == "default"
    assert keys.tenant("bearer  key-number-2 ") == "blue"
    assert ApiKeys([], is_open=True).tenant(None) == "default"


async def test_models_say_their_limits_and_whether_their_words_mean_anything(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        (model,) = (await gateway.client.get("/v1/models", headers=BEARER)).json()["data"]
        assert (await gateway.client.get("/v1/models/tiny", headers=BEARER)).json() == model
        missing = await gateway.client.get("/v1/models/acme/other", headers=BEARER)
    assert (model["id"], model["object"], model["max_model_len"], model["is_random"]) == ("tiny", "model", 16384, True)
    assert model["nvila"] == {
        "max_frames": 256,
        "max_media": 8,
        "max_answer_tokens": 1024,
        "default_answer_tokens": 64,
        "default_frames": 64,
    }
    assert missing.status_code == 404


async def test_a_decode_service_that_is_away_is_503_with_retry_after(tmp_path: Path) -> None:
    async with serving(tmp_path, ScriptedPipeline(card=Unavailable("decode is away"))) as gateway:
        for response in (await gateway.client.get("/v1/models", headers=BEARER), await gateway.ask()):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/files", 405, "method_not_allowed"),
        ("GET", "/v1/../../etc/passwd", 404, "not_found"),
    ],
)
async def test_routes_that_are_none_answer_in_openais_form(
    tmp_path: Path, method: str, path: str, status: int, code: str
) -> None:
    async with serving(tmp_path) as gateway:
        response = await gateway.client.request(method, path, headers=BEARER)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


async def test_docs_and_openapi_describe_the_chat_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        assert (await gateway.client.get("/docs", headers=BEARER)).status_code == 200
        document = (await gateway.client.get("/openapi.json", headers=BEARER)).json()
    models = document["components"]["schemas"]
    assert {"ChatRequest", "VideoPart", "ChatCompletion", "FileObject"} <= set(models)
    referred = {ref.removeprefix("#/components/schemas/") for ref in _refs(document)}
    assert referred <= set(models)


def _refs(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _refs(value)


async def test_a_browser_reads_the_docs_with_the_key_as_password_and_needs_no_other_host(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        auth = httpx.BasicAuth("anyone", KEY)
        page = await gateway.client.get("/docs", auth=auth)
        sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert sources
        assert all(source.startswith("/docs/static/") for source in sources)
        assert all([(await gateway.client.get(source, auth=auth)).status_code == 200 for source in sources])
        assert (await gateway.client.get("/docs", auth=httpx.BasicAuth(KEY, "wrong"))).status_code == 401


async def test_docs_can_be_switched_off(tmp_path: Path) -> None:
    async with serving(tmp_path, docs=False) as gateway:
        for path in ("/docs", "/openapi.json"):
            assert (await gateway.client.get(path, headers=BEARER)).status_code == 404


async def test_metrics_count_requests_by_outcome(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        await gateway.ask()
        await gateway.ask(n=2)
        await gateway.outcomes()
        text = (await gateway.client.get("/metrics", headers=BEARER)).text
    assert 'nvila_requests_total{face="http",outcome="ok"} 1.0' in text
    assert 'nvila_requests_total{face="http",outcome="invalid_request"} 1.0' in text
    assert 'nvila_time_to_first_token_seconds_count{media="none"} 1.0' in text
    assert "nvila_requests_in_flight 0.0" in text


# -- bodies


async def _send(url: str, *chunks: bytes) -> bytes:
    """What comes back for these bytes, until the server closes or is done."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
        async with asyncio.timeout(30):
            return await reader.read(65536)
    finally:
        writer.close()


def _head(*headers: str, path: str = "/v1/chat/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


_JSON = json.dumps({"messages": HELLO}).encode()


@pytest.mark.parametrize(
    ("status", "request_bytes"),
    [
        (413, _head(f"Content-Length: {100 << 20}")),
        (400, _head("Content-Length: 5", "Content-Length: 6") + b"123456"),
        (400, _head("Content-Length: -1")),
        (400, _head("Content-Length: 1_0")),
        (400, _head("Content-Length: 99999999999999999999999")),
        (400, _head("Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n"),
        (400, _head("Transfer-Encoding: chunked", "Transfer-Encoding: identity") + b"0\r\n\r\n"),
        (400, _head("Transfer-Encoding: chunked") + b"zz\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: a\r\nX Y: 1\r\n\r\n"),
        (400, b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n"),
        (422, _head(f"Content-Length: {len(_JSON) - 3}") + _JSON),
    ],
    ids=["100MB", "two", "minus", "odd", "huge", "gzip", "two TE", "chunk", "header", "headers", "short"],
)
async def test_bodies_whose_frame_is_wrong_are_refused(tmp_path: Path, status: int, request_bytes: bytes) -> None:
    async with serving(tmp_path) as gateway:
        answer = await _send(gateway.url, request_bytes)
        assert answer.startswith(b"HTTP/1.1 %d" % status), answer
        assert gateway.pipeline.questions == []


async def test_a_chunked_body_over_the_limit_is_refused_while_it_comes(tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 16)

    async with serving(tmp_path) as gateway:
        response = await gateway.client.post("/v1/chat/completions", content=endless(), headers=BEARER)
        assert await gateway.outcomes() == {"limit_exceeded": 1}
    assert response.status_code == 413
    assert response.headers["connection"] == "close"


async def test_a_body_that_does_not_come_is_given_up_and_its_permit_given_back(tmp_path: Path) -> None:
    async with serving(tmp_path, body_s=0.1) as gateway:
        answer = await _send(gateway.url, _head("Content-Length: 100") + b"{")
        assert answer.startswith(b"HTTP/1.1 504")
        assert await gateway.outcomes() == {"deadline_exceeded": 1}


async def test_a_client_that_leaves_before_its_body_is_whole_is_a_cancelled_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(_head("Content-Length: 100") + b"{")
            while not gateway.admission.running:
                await asyncio.sleep(0.001)
        assert await gateway.outcomes() == {"cancelled": 1}


async def test_a_request_without_a_key_is_refused_before_its_body(tmp_path: Path) -> None:
    head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
    async with serving(tmp_path) as gateway:
        answer = await _send(gateway.url, head)
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in answer


# -- traces and logs


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Spans of the test, whatever provider the process has."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("nvila.telemetry.tracing._TRACER", provider.get_tracer("nvila"))
    yield exporter
    provider.shutdown()


async def test_a_request_is_one_server_span_with_genai_attributes_and_no_content(
    tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with serving(tmp_path) as gateway:
        headers = {**BEARER, "traceparent": traceparent}
        body = {"messages": HELLO, "temperature": 0.5, "seed": 3, "stream": True}
        response = await gateway.client.post("/v1/chat/completions", json=body, headers=headers)
        await gateway.outcomes()
    (span,) = spans.get_finished_spans()
    assert (span.name, span.kind) == ("chat tiny", trace.SpanKind.SERVER)
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert response.headers["traceparent"].split("-")[2] == f"{span.context.span_id:016x}"
    assert span.attributes is not None
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 2076,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.video.input_tokens": 2056,
        "gen_ai.response.finish_reasons": ("stop",),
        "nvila.video.frames.dropped": 2,
    }
    assert expected.items() <= dict(span.attributes).items()
    assert "Hello" not in span.to_json()
    assert "cat" not in str(span.attributes.values())


async def test_content_enters_the_span_only_when_switched_on(
    tmp_path: Path, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    async with serving(tmp_path) as gateway:
        await gateway.ask()
        await gateway.outcomes()
    (span,) = spans.get_finished_spans()
    assert span.attributes is not None
    assert "Hello" in str(span.attributes["gen_ai.input.messages"])
    assert "A cat." in str(span.attributes["gen_ai.output.messages"])


async def test_only_errors_of_ours_mark_the_span_failed(tmp_path: Path, spans: InMemorySpanExporter) -> None:
    for script in ([InvalidMedia("bad")], [Unavailable("away")], ["A ", Unavailable("away")]):
        async with serving(tmp_path, ScriptedPipeline(script)) as gateway:
            await gateway.ask(stream=True)
            await gateway.outcomes()
    client, server, late = spans.get_finished_spans()
    assert [span.status.is_ok for span in (client, server, late)] == [True, False, False]
    assert [(span.attributes or {})["error.type"] for span in (client, server, late)] == [
        "invalid_media",
        "unavailable",
        "unavailable",
    ]


def _request_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.message == "request"]


async def test_the_line_of_a_request_names_its_tenant_and_how_it_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="nvila")
    async with serving(tmp_path, ScriptedPipeline([Unavailable("at 10.0.0.7")])) as gateway:
        await gateway.client.get("/v1/models", headers=BEARER)
        await gateway.ask()
        await gateway.client.get("/nothing", headers=BEARER)
        await gateway.client.get("/v1/models", headers={"Authorization": "Bearer wrong"})
    told = [(line["status"], line.get("tenant"), line.get("code")) for line in _request_lines(caplog)]
    assert told == [
        (200, "acme", None),
        (503, "acme", "unavailable"),
        (404, "acme", "not_found"),
        (401, None, "unauthenticated"),
    ]
    assert "10.0.0.7" not in str(_request_lines(caplog))


@pytest.mark.parametrize(
    ("script", "code"),
    [(["A ", Unavailable("decode died")], "unavailable"), (["A ", 1], "internal"), (["A ", ANSWERED], None)],
)
async def test_the_line_of_a_stream_that_broke_off_says_so_beside_the_status_that_was_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, script: list[Any], code: str | None
) -> None:
    caplog.set_level(logging.INFO, logger="nvila")
    async with serving(tmp_path, ScriptedPipeline(script)) as gateway:
        with contextlib.suppress(httpx.RemoteProtocolError):
            await gateway.ask(stream=True)
        await gateway.outcomes()
    (line,) = _request_lines(caplog)
    assert (line["status"], line.get("code")) == (200, code)


async def test_one_line_is_logged_per_request_without_query_key_or_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="nvila")
    async with serving(tmp_path) as gateway:
        await gateway.client.get("/v1/files?after=secret-query", headers=BEARER)
        await gateway.client.get("/health")
    lines = _request_lines(caplog)
    assert [(line["path"], line["status"]) for line in lines] == [("/v1/files", 422)]
    assert "secret" not in str(lines)
    assert KEY not in caplog.text
