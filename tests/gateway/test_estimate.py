"""`POST /v1/estimate`, and the pipeline's estimate behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvila.errors import LimitExceeded
from nvila.types import MediaKind, Message, Role, TextPart, VideoSampling
from tests.gateway.faces import BEARER, HELLO, Gateway, serving, video
from tests.gateway.test_pipeline import ask, make_stage, read


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with serving(tmp_path) as running:
        yield running


async def estimate(gateway: Gateway, **body: Any) -> Any:
    return await gateway.client.post("/v1/estimate", json={"messages": HELLO, **body}, headers=BEARER)


async def test_it_takes_a_chat_requests_body_and_says_what_it_costs(gateway: Gateway) -> None:
    response = await estimate(gateway, max_tokens=100, stream=True)
    said = response.json()

    assert response.status_code == 200
    assert said["object"] == "estimate"
    assert (said["fits"], said["reason"]) == (True, None)
    assert said["max_answer_tokens"] == 100
    assert said["positions"]["text_at_most"] == said["positions"]["total_at_most"] > len("Hello")
    assert said["flops"]["prefill"] > 0
    assert gateway.pipeline.questions[0].sampling.max_tokens == 100


async def test_what_a_chat_request_is_refused_for_is_refused_here_too(gateway: Gateway) -> None:
    wrong = await estimate(gateway, messages=[{"role": "user", "content": [video(num_frames=999)]}])

    assert wrong.status_code == 413
    assert wrong.json()["error"]["param"] == "messages[0].content[0].video_url"
    assert (await gateway.outcomes())["limit_exceeded"] == 1


async def test_it_is_documented(gateway: Gateway) -> None:
    document = (await gateway.client.get("/openapi.json", headers=BEARER)).json()
    body = document["paths"]["/v1/estimate"]["post"]["requestBody"]["content"]["application/json"]["schema"]

    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    assert {"Estimate", "EstimatedMedia"} <= set(document["components"]["schemas"])


async def test_an_estimate_decodes_and_encodes_nothing_and_equals_the_answer() -> None:
    stage = make_stage()
    asked = ask(MediaKind.VIDEO, sampling=VideoSampling(num_frames=50))
    cost = await stage.pipeline.estimate(asked)

    assert (stage.frames.probes, stage.frames.decodes, len(stage.vision.calls)) == (1, 0, 0)
    assert stage.fetcher.is_open == 0
    (item,) = cost.media
    assert (item.frames, item.chunks, item.tiles) == (56, 2, 56)
    _, answered = await read(stage.pipeline.answer(asked))
    (media,) = answered.coverage.media
    assert (media.tokens, media.chunks, media.tiles) == (item.positions, item.chunks, item.tiles)


async def test_what_does_not_fit_is_told_in_the_words_in_which_it_would_be_refused() -> None:
    stage = make_stage(max_model_len=40)
    cost = await stage.pipeline.estimate(ask(MediaKind.VIDEO))

    assert cost.fits is False
    with pytest.raises(LimitExceeded) as refused:
        await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    assert refused.value.message == cost.excess


async def test_whether_long_text_fits_beside_the_media_is_left_open() -> None:
    asked = ask(MediaKind.VIDEO)
    parts = (*asked.messages[0].parts, TextPart("word " * 50))
    cost = await make_stage(max_model_len=200).pipeline.estimate(replace(asked, messages=(Message(Role.USER, parts),)))

    assert cost.fits is None
    assert cost.visual(MediaKind.VIDEO) == cost.visual() < 200 < cost.positions_at_most
