"""One trace over all programs, with the parents right."""

from __future__ import annotations

import secrets

import httpx

from tests.clips import CARPHONE
from tests.e2e.asking import data_url, messages, video_part
from tests.otlp import OtlpReceiver


async def test_one_question_is_one_trace_over_every_program(http: httpx.AsyncClient, receiver: OtlpReceiver) -> None:
    trace_id, caller = secrets.token_hex(16), secrets.token_hex(8)
    asked = messages(video_part(data_url(CARPHONE), num_frames=64, start_s=0.2))
    answer = await http.post(
        "/v1/chat/completions",
        json={"messages": asked, "max_tokens": 4},
        headers={"traceparent": f"00-{trace_id}-{caller}-01"},
    )
    assert answer.status_code == 200, answer.text
    spans = receiver.wait_for(trace_id, caller, {"nvila-gateway", "nvila-vision", "nvila-decode"})

    by_id = {span.span_id: span for span in spans}
    orphans = [span for span in spans if span.parent_id not in by_id and span.parent_id != caller]
    assert not orphans, [(span.service, span.name) for span in orphans]
    (root,) = [span for span in spans if span.parent_id == caller]
    assert root.service == "nvila-gateway"
    assert root.attributes["gen_ai.operation.name"] == "chat"
    assert root.attributes["gen_ai.usage.video.input_tokens"] > 0  # type: ignore[operator]

    def parents(name: str, service: str) -> set[str]:
        return {by_id[span.parent_id].name for span in spans if span.name == name and span.service == service}

    assert parents("vision", "nvila-gateway") == {root.name}
    assert parents("decode", "nvila-gateway") == {root.name}
    assert "decode" in parents("decode", "nvila-decode")
    vision_side = [span for span in spans if span.service == "nvila-vision"]
    assert len({span.parent_id for span in vision_side}) >= 2, "one parent for each of the two chunks"
    (fetched,) = [span for span in spans if span.name == "fetch tokens"]
    writers = {span.span_id for span in spans if span.name == "vision.publish"}
    assert set(fetched.links) == writers, "the reader of tokens is linked to who wrote them"
    assert not any(span.is_error for span in spans), [(s.service, s.name) for s in spans if s.is_error]


async def test_spans_carry_no_content(http: httpx.AsyncClient, receiver: OtlpReceiver) -> None:
    trace_id, caller = secrets.token_hex(16), secrets.token_hex(8)
    asked = [{"role": "user", "content": "the secret word is heliotrope"}]
    answer = await http.post(
        "/v1/chat/completions",
        json={"messages": asked, "max_tokens": 4},
        headers={"traceparent": f"00-{trace_id}-{caller}-01"},
    )
    assert answer.status_code == 200, answer.text
    spans = receiver.wait_for(trace_id, caller, {"nvila-gateway", "nvila-decode"})
    assert not [span for span in spans if "heliotrope" in repr(span)]
