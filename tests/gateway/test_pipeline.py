"""The pipeline between fakes: what it asks of whom, in which order, and what it does when they fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from nvila.errors import (
    DeadlineExceeded,
    InvalidMedia,
    InvalidRequest,
    LimitExceeded,
    MediaUnavailable,
    Overloaded,
    Unavailable,
)
from nvila.gateway.pipeline import Pipeline, PipelineLimits
from nvila.model.config import ImageMode, LlmConfig, NvilaConfig, TowerConfig, Wrap
from nvila.telemetry.metrics import Metrics
from nvila.types import (
    Answered,
    AnswerEvent,
    Deadline,
    Gap,
    MediaKind,
    MediaPart,
    MediaSource,
    Message,
    Question,
    Role,
    SamplingParams,
    TextDelta,
    TextPart,
    VideoSampling,
)
from tests.gateway.services import WIDTH, FakeDecoder, FakeFetcher, FakeFile, FakeFrames, FakeStore, FakeVision, card_of

CONFIG = NvilaConfig(
    name="fake",
    tower=TowerConfig(
        image_px=56, patch_px=14, width=4, mlp_width=4, layers=2, heads=1, norm_eps=1e-6, select_layer=-2
    ),
    llm=LlmConfig(
        width=WIDTH,
        mlp_width=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_width=8,
        vocab=100,
        is_tied=False,
        max_positions=16384,
        norm_eps=1e-6,
        rope_base=1e6,
    ),
    image_mode=ImageMode.DYNAMIC_S2,
    tile_px=56,
    s2_scales=(56, 112, 168),
    projector_type="mlp_downsample",
    projector_width=12,
    image_wrap=Wrap(end=(10,)),
    video_wrap=Wrap(end=(10,)),
    pool_sizes=((8, 1, 1),),
    default_frames=64,
)


@dataclass
class Stage:
    """A pipeline and the fakes around it."""

    pipeline: Pipeline
    fetcher: FakeFetcher
    frames: FakeFrames
    store: FakeStore
    vision: FakeVision
    decoder: FakeDecoder


def make_stage(frames: FakeFrames | None = None, *, max_model_len: int = 16384, recovery_s: float = 5.0) -> Stage:
    store = FakeStore()
    stage_frames = frames or FakeFrames()
    vision, fetcher = FakeVision(store), FakeFetcher()
    decoder = FakeDecoder(store, card_of(CONFIG.to_json(), max_model_len))
    pipeline = Pipeline(
        fetcher=fetcher,
        frames=stage_frames,
        store=store,
        vision=vision,
        decoder=decoder,
        limits=PipelineLimits(recovery_s=recovery_s),
        metrics=Metrics(),
    )
    return Stage(pipeline, fetcher, stage_frames, store, vision, decoder)


def ask(*kinds: MediaKind, sampling: VideoSampling | None = None, timeout_s: float = 20.0) -> Question:
    media = tuple(
        MediaSource(
            kind=kind, url=f"http://media/{position}", param=f"media[{position}]", sampling=sampling or VideoSampling()
        )
        for position, kind in enumerate(kinds)
    )
    parts: tuple[TextPart | MediaPart, ...] = (
        *(MediaPart(position) for position in range(len(kinds))),
        TextPart("What happens?"),
    )
    return Question(
        request_id="r",
        tenant="t",
        messages=(Message(Role.USER, parts),),
        media=media,
        sampling=SamplingParams(max_tokens=16),
        deadline=Deadline.after(timeout_s),
    )


async def read(events: AsyncIterator[AnswerEvent]) -> tuple[str, Answered]:
    text, last = "", None
    async for event in events:
        if isinstance(event, TextDelta):
            text += event.text
        else:
            last = event
    assert last is not None
    return text, last


async def test_a_video_is_cut_into_chunks_encoded_and_answered_about() -> None:
    stage = make_stage()
    text, answered = await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    assert text == "a bike rides past"
    (video,) = answered.coverage.media
    assert (video.frames_asked, video.frames_decoded, video.frames_encoded, video.frames_reused) == (64, 64, 64, 0)
    assert (video.chunks, video.cache_hits, video.tiles, video.tokens) == (2, 0, 64, 8 * (4 + 1))
    assert (video.start_s, video.end_s, video.gaps) == (0.0, 6.3, ())
    assert {"fetch", "plan", "video", "cache", "vision", "decode", "decode.prefill", "total", "first_token"} <= set(
        answered.coverage.stage_ms
    )


async def test_the_second_question_decodes_and_encodes_nothing() -> None:
    stage = make_stage()
    await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    probes, decodes, calls = stage.frames.probes, stage.frames.decodes, len(stage.vision.calls)
    text, answered = await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    (video,) = answered.coverage.media
    assert text == "a bike rides past"
    assert (video.frames_decoded, video.frames_encoded, video.frames_reused, video.cache_hits) == (0, 0, 64, 2)
    assert (stage.frames.probes, stage.frames.decodes, len(stage.vision.calls)) == (probes, decodes, calls)


async def test_only_the_evicted_chunk_is_decoded_again() -> None:
    stage = make_stage()
    await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    evicted = stage.decoder.requests[0].media[0].records[1].key
    stage.store.keys.remove(evicted)
    _, answered = await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    (video,) = answered.coverage.media
    assert (video.frames_decoded, video.frames_encoded, video.frames_reused) == (32, 32, 32)
    assert [ref.key for ref in stage.vision.calls][2:] == [evicted]


async def test_generation_is_asked_for_before_the_last_chunk_is_encoded() -> None:
    stage = make_stage()
    stage.vision.gate.clear()
    answer = asyncio.create_task(read(stage.pipeline.answer(ask(MediaKind.VIDEO))))
    async with asyncio.timeout(30):
        while not stage.decoder.requests:
            await asyncio.sleep(0)
    assert not answer.done()
    stage.vision.gate.set()
    assert (await answer)[0] == "a bike rides past"


async def test_without_a_cache_the_tokens_travel_inline() -> None:
    stage = make_stage()
    stage.store.is_down = True
    text, answered = await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    assert text == "a bike rides past"
    assert {tokens.ref.key for tokens in stage.decoder.requests[-1].inline} == {
        ref.key for ref in stage.decoder.requests[-1].media[0].records
    }
    assert answered.coverage.media[0].frames_encoded == 64
    assert not stage.store.plans


async def test_tokens_that_the_cache_lost_after_publishing_are_encoded_again() -> None:
    stage = make_stage()

    async def forget_once() -> None:
        while len(stage.store.keys) < 2:
            await asyncio.sleep(0)
        stage.store.is_down = True
        stage.store.keys.clear()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(forget_once())
        text, answered = await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    assert text == "a bike rides past"
    assert answered.coverage.media[0].frames_dropped == 0


async def test_a_vision_call_that_fails_is_repeated() -> None:
    stage = make_stage()
    stage.vision.failures = [Unavailable("triton is gone")]
    text, answered = await read(stage.pipeline.answer(ask(MediaKind.IMAGE)))
    assert text == "a bike rides past"
    assert len(stage.vision.calls) == 2
    assert answered.coverage.media[0].frames_encoded == 1


async def test_a_service_that_stays_away_ends_the_request_with_its_error() -> None:
    stage = make_stage(recovery_s=0.2)
    stage.vision.failures = [Unavailable("triton is gone")] * 50
    with pytest.raises(Unavailable, match="triton is gone"):
        await read(stage.pipeline.answer(ask(MediaKind.IMAGE)))
    assert stage.fetcher.is_open == stage.frames.held == stage.decoder.running == 0


async def test_an_error_that_is_not_about_availability_is_not_repeated() -> None:
    stage = make_stage()
    stage.vision.failures = [Overloaded("queue full", retry_after_s=1)]
    with pytest.raises(Overloaded):
        await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    assert stage.fetcher.is_open == stage.frames.held == stage.decoder.running == 0


async def test_a_broken_stream_goes_on_where_it_was_without_repeating_text() -> None:
    stage = make_stage()
    stage.decoder.breaks_after = [2, 0, 1]
    text, answered = await read(stage.pipeline.answer(ask(MediaKind.IMAGE)))
    assert text == "a bike rides past"
    assert [request.resume_ids for request in stage.decoder.requests] == [(), (0, 1), (0, 1), (0, 1, 2)]
    assert answered.completion_tokens == 4


async def test_the_single_image_of_a_prompt_is_tiled_and_several_are_not() -> None:
    stage = make_stage()
    await read(stage.pipeline.answer(ask(MediaKind.IMAGE)))
    await read(stage.pipeline.answer(ask(MediaKind.IMAGE, MediaKind.IMAGE)))
    one, two = stage.decoder.requests
    assert [media.is_tiled for media in one.media] == [True]
    assert [media.is_tiled for media in two.media] == [False, False]
    assert one.media[0].records[0].tokens > two.media[0].records[0].tokens


async def test_lost_frames_are_told_as_gaps() -> None:
    stage = make_stage(FakeFrames(64, lost=range(10, 14)))
    _, answered = await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    (video,) = answered.coverage.media
    assert (video.frames_dropped, video.frames_decoded, video.frames_padded) == (4, 60, 4)
    assert video.gaps == (Gap(start_s=0.9, end_s=1.4, reason="4 frames could not be decoded"),)


async def test_a_chunk_without_any_frame_is_left_out() -> None:
    stage = make_stage(FakeFrames(64, lost=range(32)))
    _, answered = await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    (video,) = answered.coverage.media
    assert (video.frames_dropped, video.chunks, len(stage.decoder.requests[0].media[0].records)) == (32, 2, 1)
    assert [(gap.start_s, gap.end_s) for gap in video.gaps] == [(0.0, 3.1)]


async def test_media_without_any_frame_is_an_error() -> None:
    stage = make_stage(FakeFrames(64, lost=range(64)))
    with pytest.raises(InvalidMedia, match="none of its 64 frames"):
        await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))


async def test_what_is_wrong_with_one_of_several_media_names_it() -> None:
    stage = make_stage()
    question = ask(MediaKind.IMAGE, MediaKind.VIDEO, sampling=VideoSampling(start_s=99))
    with pytest.raises(InvalidRequest, match="past the video's end") as caught:
        await read(stage.pipeline.answer(question))
    assert caught.value.param == "media[1]"


async def test_an_address_whose_host_is_away_is_named_too() -> None:
    class Away(FakeFetcher):
        @asynccontextmanager
        async def open(self, source: MediaSource, tenant: str, deadline: Deadline) -> AsyncIterator[FakeFile]:
            if source.kind is MediaKind.VIDEO:
                raise MediaUnavailable("the host of the media address answered 503", param="url")
            async with super().open(source, tenant, deadline) as file:
                yield file

    stage = make_stage()
    stage.pipeline.fetcher = Away()
    with pytest.raises(MediaUnavailable) as caught:
        await read(stage.pipeline.answer(ask(MediaKind.IMAGE, MediaKind.VIDEO)))
    assert caught.value.param == "media[1]"


async def test_too_many_tokens_are_refused_before_any_frame_is_decoded() -> None:
    stage = make_stage(max_model_len=50)
    with pytest.raises(LimitExceeded, match=r"40 asked, at most 34 allowed"):
        await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    assert stage.frames.decodes == 0


async def test_a_model_that_cannot_hold_the_largest_video_is_reported() -> None:
    stage = make_stage(max_model_len=160)
    assert stage.pipeline.check_budgets() == ["the decode service has not described its model yet"]
    await stage.pipeline.describe()
    assert stage.pipeline.check_budgets() == ["256 frames make 160 tokens, the language model takes 160"]


async def test_a_request_that_comes_while_decode_is_away_waits_for_it() -> None:
    stage = make_stage()
    stage.decoder.breaks_after = [1]
    await read(stage.pipeline.answer(ask(MediaKind.IMAGE)))
    assert stage.pipeline.is_doubtful
    stage.decoder.is_away = True
    stage.decoder.breaks_after = [0]  # still away at the first try
    assert (await read(stage.pipeline.answer(ask(MediaKind.IMAGE))))[0] == "a bike rides past"
    stage.decoder.is_away = False
    await stage.pipeline.describe()
    assert not stage.pipeline.is_doubtful


async def test_a_request_before_anyone_knows_the_model_is_unavailable() -> None:
    stage = make_stage()
    stage.decoder.is_away = True
    with pytest.raises(Unavailable, match="does not answer"):
        await read(stage.pipeline.answer(ask(MediaKind.IMAGE)))


async def test_closing_the_answer_stops_all_work() -> None:
    stage = make_stage()
    stage.vision.gate.clear()
    events = stage.pipeline.answer(ask(MediaKind.VIDEO))
    waiting = asyncio.create_task(anext(events))
    async with asyncio.timeout(30):
        while not stage.decoder.running:
            await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await events.aclose()
    assert stage.fetcher.is_open == stage.frames.held == stage.decoder.running == 0


async def test_a_request_ends_when_its_time_is_up() -> None:
    stage = make_stage()
    stage.vision.gate.clear()
    with pytest.raises(DeadlineExceeded):
        await read(stage.pipeline.answer(ask(MediaKind.VIDEO, timeout_s=0.1)))
    assert stage.fetcher.is_open == stage.frames.held == stage.decoder.running == 0


async def test_a_question_without_media_goes_straight_to_decode() -> None:
    stage = make_stage()
    text, answered = await read(stage.pipeline.answer(ask()))
    assert text == "a bike rides past"
    assert answered.coverage.media == ()


async def test_a_spoilt_plan_is_ignored() -> None:
    stage = make_stage()
    await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    stage.store.plans = dict.fromkeys(stage.store.plans, b'{"chunks": 3}')
    _, answered = await read(stage.pipeline.answer(ask(MediaKind.VIDEO)))
    assert answered.coverage.media[0].frames_decoded == 64
    assert answered.coverage.media[0].frames_encoded == 0
