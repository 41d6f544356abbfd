"""What a client sees of the whole path: answers, usage, coverage, reuse."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai

from tests.clips import BIKES, BUNNY, CARPHONE
from tests.e2e.asking import ask, data_url, image_part, messages, picture, picture_url, video_part


async def test_256_frames_become_32_groups_of_tokens_and_the_second_question_encodes_nothing(
    client: openai.AsyncOpenAI,
) -> None:
    asked = messages(video_part(data_url(BIKES), num_frames=256))
    first = await ask(client, asked)
    (video,) = first.coverage["media"]
    assert first.text
    assert video["frames_asked"] == video["frames_encoded"] == 256
    assert video["chunks"] == 8
    assert first.usage.prompt_tokens_details.to_dict()["video_tokens"] == video["tokens"]
    assert video["tokens"] % 32 == 0

    second = await ask(client, messages(video_part(data_url(BIKES), num_frames=256), question="And how does it end?"))
    (again,) = second.coverage["media"]
    assert (again["frames_decoded"], again["frames_encoded"], again["frames_reused"]) == (0, 0, 256)
    assert again["tokens"] == video["tokens"]
    assert second.usage.prompt_tokens_details.cached_tokens > video["tokens"] // 2
    assert second.first_token_s < first.first_token_s / 2


async def test_an_answer_is_the_same_streamed_and_whole_first_time_and_from_the_cache(
    client: openai.AsyncOpenAI,
) -> None:
    asked = messages(video_part(data_url(CARPHONE), num_frames=40))
    streamed = await ask(client, asked, max_tokens=64)
    whole = await client.chat.completions.create(model="", messages=asked, max_tokens=64)  # type: ignore[arg-type]
    assert whole.choices[0].message.content == streamed.text
    assert whole.choices[0].finish_reason == streamed.finish_reason
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == streamed.usage.prompt_tokens
    assert (whole.model_extra or {})["coverage"]["media"][0]["frames_reused"] == 40


async def test_a_long_answer_comes_in_pieces(client: openai.AsyncOpenAI) -> None:
    """What piles up while a busy machine lets nobody read comes as one piece, so few tokens prove nothing."""
    asked = messages(image_part(picture_url(picture(64, 64, seed=8))))
    answer = await ask(client, asked, max_tokens=400, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 400
    assert len(answer.pieces) > 1


async def test_media_are_used_in_order_and_all_of_them(client: openai.AsyncOpenAI) -> None:
    one, two = picture_url(picture(320, 200, seed=1)), picture_url(picture(90, 333, seed=2))
    forward = await ask(client, messages(image_part(one), image_part(two)))
    backward = await ask(client, messages(image_part(two), image_part(one)))
    mixed = await ask(client, messages(image_part(one), video_part(data_url(CARPHONE), num_frames=8)))
    assert [media["kind"] for media in forward.coverage["media"]] == ["image", "image"]
    assert [media["kind"] for media in mixed.coverage["media"]] == ["image", "video"]
    assert forward.text != backward.text
    details = mixed.usage.prompt_tokens_details.to_dict()
    assert details["image_tokens"] > 0
    assert details["video_tokens"] > 0


async def test_a_window_looks_at_that_part_only(client: openai.AsyncOpenAI) -> None:
    answer = await ask(client, messages(video_part(data_url(BUNNY), num_frames=16, start_s=1.0, end_s=2.0)))
    (video,) = answer.coverage["media"]
    assert 1.0 <= video["start_s"] < video["end_s"] <= 2.0


async def test_concurrent_questions_of_all_kinds_are_all_answered_as_alone(client: openai.AsyncOpenAI) -> None:
    questions = [messages(video_part(data_url(CARPHONE), num_frames=16 + 8 * (number % 3))) for number in range(6)] + [
        messages(image_part(picture_url(picture(200 + 50 * number, 180, seed=number)))) for number in range(4)
    ]
    alone = [(await ask(client, question)).text for question in questions]
    together = await asyncio.gather(*(ask(client, question) for question in questions))
    assert [answer.text for answer in together] == alone


async def test_an_uploaded_file_is_asked_about_by_its_id(client: openai.AsyncOpenAI) -> None:
    uploaded = await client.files.create(file=BIKES, purpose="vision")
    by_id = await ask(client, messages(video_part(uploaded.id, num_frames=24)))
    by_data = await ask(client, messages(video_part(data_url(BIKES), num_frames=24)))
    assert by_id.text == by_data.text
    assert by_data.coverage["media"][0]["frames_encoded"] == 0
    assert (await client.files.content(uploaded.id)).content == BIKES.read_bytes()
    await client.files.delete(uploaded.id)


async def test_a_client_that_leaves_stops_the_work(client: openai.AsyncOpenAI, http: httpx.AsyncClient) -> None:
    create: Any = client.chat.completions.create
    stream = await create(
        model="",
        messages=messages(picture_part := image_part(picture_url(picture(64, 64, seed=9)))),
        stream=True,
        max_tokens=4000,
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            break
    await stream.close()
    async with asyncio.timeout(30):
        while "nvila_requests_in_flight 0.0" not in (await http.get("/metrics")).text:
            await asyncio.sleep(0.1)
    assert (await ask(client, messages(picture_part))).text


async def test_the_model_says_what_it_is(client: openai.AsyncOpenAI) -> None:
    (model,) = (await client.models.list()).data
    extra = model.model_extra or {}
    assert extra["nvila"]["max_frames"] == 256
    assert extra["is_random"] is True
    assert extra["max_model_len"] >= 4096
