"""Questions about recordings through the pipeline: kept tokens, lost tokens, other media beside, windows in parts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nvila.cache.codec import RecordFormat
from nvila.errors import DeadlineExceeded, InvalidRequest, LimitExceeded, NotFound, Unavailable
from nvila.gateway.parse import parse_chat, to_asked
from nvila.gateway.pipeline import PipelineLimits
from nvila.model.config import NvilaConfig
from nvila.recordings.planner import Budget
from nvila.recordings.types import ChunkPolicy, Group, RecordedChunk, Recording, RecordingState, Source, SourceKind
from nvila.recordings.window import OpenWindow, Restored, lay_window, resolve
from nvila.types import (
    Deadline,
    DecodeEvent,
    Finished,
    Gap,
    GenerateRequest,
    Level,
    MediaKind,
    MediaPart,
    MediaSource,
    Message,
    Question,
    RecordingWindow,
    Role,
    SamplingParams,
    TextPart,
    TokenDtype,
    TokensRef,
    VisualTokens,
    WindowMode,
)
from tests.gateway.faces import BEARER, LIMITS, serving
from tests.gateway.services import WIDTH, FakeDecoder
from tests.gateway.test_pipeline import Stage, make_stage, read

RECORDING = "rec_" + "0" * 32
TENANT = "t"


@dataclass
class KeptRecording:
    """The recordings of a gateway: one, of `groups` groups of eight frames at 1 per second; four make a chunk."""

    groups: int = 8
    gaps: dict[int, Gap] = field(default_factory=dict)
    restored: list[str] = field(default_factory=list)
    encodes: bool = False
    is_published: bool = True
    failures: list[Unavailable] = field(default_factory=list)
    stage: Stage | None = None

    @property
    def recording(self) -> Recording:
        return Recording(
            id=RECORDING,
            tenant=TENANT,
            name="yard",
            source=Source(kind=SourceKind.FILE, file_id="file-1"),
            policy=ChunkPolicy(),
            state=RecordingState.COMPLETE,
            created_at=0,
            captured_at=1_800_000_000.0,
            ingested_s=self.groups * 8.0,
        )

    async def open(self, asked: RecordingWindow, tenant: str, budget: Budget, config: NvilaConfig) -> OpenWindow:
        if (asked.recording_id, tenant) != (RECORDING, TENANT):
            raise NotFound(f"no recording {asked.recording_id!r}")
        start_s, end_s = resolve(asked, self.recording)
        chunks = [self._chunk(number) for number in range(-(-self.groups // 4))]
        inside = [chunk for chunk in chunks if chunk.end_s > start_s and chunk.start_s < end_s]
        return lay_window(self.recording, start_s, end_s, inside, budget, config)

    def _chunk(self, number: int) -> RecordedChunk:
        places = range(number * 4, min(self.groups, number * 4 + 4))
        return RecordedChunk(
            recording_id=RECORDING,
            number=number,
            start_s=places[0] * 8.0,
            end_s=(places[-1] + 1) * 8.0,
            groups=tuple(
                Group(
                    times_s=tuple(place * 8.0 + second for second in range(8)),
                    segment=0,
                    indices=tuple(range(8)),
                    ref=ref(place),
                )
                for place in places
            ),
            gaps=(self.gaps[number],) if number in self.gaps else (),
        )

    async def restore(
        self, window: OpenWindow, one: TokensRef, form: RecordFormat, config: NvilaConfig, deadline: Deadline
    ) -> Restored:
        if self.failures:
            raise self.failures.pop(0)
        self.restored.append(one.key)
        tokens = VisualTokens(
            ref=one,
            dtype=TokenDtype.FLOAT32,
            values_TD=np.zeros((one.tokens, WIDTH), np.float32),
            scales_T=None,
            vision_revision=form.vision_revision,
        )
        assert self.stage is not None
        is_published = self.is_published and not self.stage.store.is_down
        if is_published:
            self.stage.store.keys.add(one.key)
        return Restored(tokens=tokens, is_published=is_published, encoded_frames=8 if self.encodes else 0)


def ref(place: int) -> TokensRef:
    return TokensRef(key=f"{place:064x}", levels=(Level(1, 4),))


def stage_with(kept: KeptRecording, *, max_model_len: int = 16384, hot: bool = True, **limits: Any) -> Stage:
    stage = make_stage(max_model_len=max_model_len)
    stage.pipeline = replace(stage.pipeline, recordings=kept, limits=PipelineLimits(recovery_s=5.0, **limits))
    kept.stage = stage
    if hot:
        stage.store.keys |= {ref(place).key for place in range(kept.groups)}
    return stage


def ask(*media: MediaSource | None, timeout_s: float = 20.0, tenant: str = TENANT, **window: float | None) -> Question:
    """`None`, or nothing: the recording's window."""
    recorded = MediaSource(
        kind=MediaKind.VIDEO,
        recording=RecordingWindow(recording_id=RECORDING, **window),
        param="messages[0].content[0].recording",
    )
    sources = tuple(recorded if one is None else one for one in media) or (recorded,)
    parts: list[TextPart | MediaPart] = [MediaPart(place) for place in range(len(sources))]
    parts.append(TextPart("What happens?"))
    return Question(
        request_id="r",
        tenant=tenant,
        messages=(Message(Role.USER, tuple(parts)),),
        media=sources,
        sampling=SamplingParams(max_tokens=16),
        deadline=Deadline.after(timeout_s),
    )


IMAGE = MediaSource(kind=MediaKind.IMAGE, url="http://media/0", param="m")


async def test_an_answer_stands_on_kept_tokens_and_computes_nothing() -> None:
    kept = KeptRecording(gaps={1: Gap(start_s=40, end_s=44, reason="camera away")})
    stage = stage_with(kept)

    text, answered = await read(stage.pipeline.answer(ask(start_s=8.0, end_s=56.0)))

    assert text == "a bike rides past"
    (request,) = stage.decoder.requests
    assert [one.key for one in request.media[0].records] == [ref(place).key for place in range(1, 7)]
    assert request.inline == ()
    assert (stage.frames.decodes, len(stage.vision.calls), kept.restored) == (0, 0, [])
    (media,) = answered.coverage.media
    assert (media.frames_asked, media.frames_reused, media.frames_encoded) == (48, 48, 0)
    assert (media.start_s, media.end_s, media.tokens) == (8.0, 55.0, 6 * 5)
    assert media.gaps == (Gap(start_s=40, end_s=44, reason="camera away"),)
    assert media.recording is not None
    assert media.recording.plan.mode is WindowMode.FULL
    assert (media.recording.captured_from, media.recording.captured_to) == (1_800_000_008.0, 1_800_000_056.0)
    assert media.recording.plan.seconds_per_frame == pytest.approx(44 / 48)


async def test_a_follow_up_is_asked_of_the_same_tokens() -> None:
    stage = stage_with(KeptRecording())
    await read(stage.pipeline.answer(ask()))
    await read(stage.pipeline.answer(ask()))
    first, second = stage.decoder.requests
    assert first.media == second.media
    assert first.affinity == second.affinity


@pytest.mark.parametrize("encodes", [False, True])
async def test_lost_tokens_are_restored_before_the_answer(encodes: bool) -> None:
    kept = KeptRecording(encodes=encodes)
    stage = stage_with(kept)
    stage.store.keys -= {ref(2).key, ref(5).key}

    _, answered = await read(stage.pipeline.answer(ask()))

    assert kept.restored == [ref(2).key, ref(5).key]
    assert stage.decoder.requests[0].inline == ()
    (media,) = answered.coverage.media
    assert (media.cache_hits, media.frames_encoded) == (6, 16 if encodes else 0)


async def test_with_redis_away_the_tokens_travel_with_the_question() -> None:
    kept = KeptRecording()
    stage = stage_with(kept, hot=False)
    stage.store.is_down = True

    text, _ = await read(stage.pipeline.answer(ask()))

    assert text == "a bike rides past"
    assert {one.ref.key for one in stage.decoder.requests[-1].inline} == {ref(place).key for place in range(8)}


async def test_redis_that_goes_between_question_and_answer_changes_nothing() -> None:
    kept = KeptRecording()
    stage = stage_with(kept)
    has = stage.store.has

    async def has_then_goes(refs: Any, form: RecordFormat) -> set[str]:
        there = await has(refs, form)
        stage.store.is_down = True
        stage.store.keys.clear()
        return there

    stage.store.has = has_then_goes  # type: ignore[method-assign]  # it goes right after it was asked

    text, _ = await read(stage.pipeline.answer(ask()))

    assert text == "a bike rides past"
    assert len(kept.restored) == 8


async def test_vision_that_is_away_while_tokens_are_restored_is_waited_for() -> None:
    kept = KeptRecording(failures=[Unavailable("vision is away")] * 2)
    stage = stage_with(kept, hot=False)
    text, _ = await read(stage.pipeline.answer(ask()))
    assert text == "a bike rides past"


async def test_a_recording_and_an_image_are_asked_about_together() -> None:
    stage = stage_with(KeptRecording())
    _, answered = await read(stage.pipeline.answer(ask(IMAGE, None)))
    assert [media.kind for media in answered.coverage.media] == [MediaKind.IMAGE, MediaKind.VIDEO]
    assert [media.recording is None for media in answered.coverage.media] == [True, False]


async def test_a_window_too_long_for_its_tokens_is_averaged_and_says_so() -> None:
    kept = KeptRecording(groups=60)
    stage = stage_with(kept)
    _, answered = await read(stage.pipeline.answer(ask()))
    plan = answered.coverage.media[0].recording.plan  # type: ignore[union-attr]  # it is a recording
    assert (plan.mode, plan.pool, plan.blocks, plan.seconds_per_frame) == (WindowMode.POOLED, 2, 30, 1.0)
    assert len(kept.restored) == 30, "averages are not kept yet"
    assert len(stage.decoder.requests[0].media[0].records) == 30


async def test_a_window_too_long_for_any_average_is_asked_about_in_parts() -> None:
    kept = KeptRecording(groups=32 * 9)
    stage = stage_with(kept)

    text, answered = await read(stage.pipeline.answer(ask(IMAGE, None)))

    assert text == "a bike rides past"
    *parts, closing = stage.decoder.requests
    assert len(parts) == 9
    assert len({len(part.media[1].records) for part in parts}) == 1
    assert len(closing.media) == 1, "the image stays, the recording became notes"
    notes = "".join(part.text for part in closing.messages[0].parts if isinstance(part, TextPart))
    assert "[0:04:16 to 0:08:32] a bike rides past" in notes
    assert notes.endswith("What happens?")
    image, media = answered.coverage.media
    assert image.kind is MediaKind.IMAGE
    assert (media.frames_asked, media.frames_reused, media.tokens) == (32 * 9 * 8, 32 * 9 * 8, 32 * 9 * 5)
    assert media.recording is not None
    assert (media.recording.plan.mode, media.recording.plan.calls) == (WindowMode.MAP_REDUCE, 10)
    assert answered.usage.text == 5 * 10
    assert answered.completion_tokens == 4 * 10


async def test_more_parts_than_a_request_may_have_are_a_job() -> None:
    stage = stage_with(KeptRecording(groups=32 * 9), inline_parts=8)
    with pytest.raises(LimitExceeded, match=r"9 needed, at most 8 allowed .* job") as refused:
        await read(stage.pipeline.answer(ask()))
    assert refused.value.param == "messages[0].content[0].recording"
    assert stage.decoder.requests == []


async def test_parts_that_would_take_longer_than_there_is_time_are_given_up_early() -> None:
    stage = stage_with(KeptRecording(groups=32 * 12))
    stage.pipeline.decoder = Slow(stage.decoder, 0.6)
    began = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceeded, match=r"needs 13 model calls, about .* job"):
        await read(stage.pipeline.answer(ask(timeout_s=3.5)))
    assert asyncio.get_running_loop().time() - began < 3.0


@dataclass
class Slow:
    inner: FakeDecoder
    seconds: float

    async def describe(self) -> Any:
        return await self.inner.describe()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[DecodeEvent]:
        async for event in self.inner.generate(request):
            if isinstance(event, Finished):
                await asyncio.sleep(self.seconds)
            yield event


async def test_two_windows_share_the_budget_and_only_one_may_need_parts() -> None:
    stage = stage_with(KeptRecording(groups=32 * 9))
    with pytest.raises(InvalidRequest, match="2 recordings' windows are too long"):
        await read(stage.pipeline.answer(ask(None, None)))
    stage = stage_with(KeptRecording(groups=32), max_model_len=300)
    _, answered = await read(stage.pipeline.answer(ask(None, None)))
    tokens = [media.tokens for media in answered.coverage.media]
    assert tokens[0] == tokens[1]
    assert sum(tokens) <= 300


@pytest.mark.parametrize(
    ("window", "says"),
    [
        ({"start_s": 30.0, "end_s": 20.0}, "starts at 30 s and ends at 20 s"),
        ({"start_s": -1.0}, "not -1"),
        ({"end_s": float("nan")}, "not nan"),
        ({"start_s": 64.0}, "starts at 64 s, past the recording's end at 64 s"),
    ],
)
async def test_bad_windows_blame_their_part_of_the_request(window: dict[str, Any], says: str) -> None:
    stage = stage_with(KeptRecording())
    with pytest.raises(InvalidRequest, match=says) as refused:
        await read(stage.pipeline.answer(ask(**window)))
    assert refused.value.param == "messages[0].content[0].recording"


async def test_another_tenants_recording_is_not_found() -> None:
    stage = stage_with(KeptRecording())
    with pytest.raises(NotFound) as refused:
        await read(stage.pipeline.answer(ask(tenant="zeta")))
    assert refused.value.param == "messages[0].content[0].recording"


async def test_a_gateway_without_recordings_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no recordings are kept here"):
        await read(make_stage().pipeline.answer(ask()))


@pytest.mark.parametrize(("groups", "fits"), [(8, True), (60, True), (32 * 9, True)])
async def test_an_estimate_tells_plan_coverage_and_cost_beforehand(groups: int, fits: bool) -> None:
    stage = stage_with(KeptRecording(groups=groups))

    cost = await stage.pipeline.estimate(ask())

    assert stage.decoder.requests == []
    assert cost.fits is fits
    (item,) = cost.media
    assert item.recording is not None
    _, answered = await read(stage.pipeline.answer(ask()))
    (media,) = answered.coverage.media
    assert media.recording == item.recording
    assert media.tokens == item.recording.plan.tokens
    assert cost.tower_flops == 0
    assert cost.prefill_flops > 0


# -- the request


PART = {"type": "recording", "recording": {"id": RECORDING, "start_s": 5, "end_s": 9.5}}


def chat(part: dict[str, Any]) -> bytes:
    content = [part, {"type": "text", "text": "What?"}]
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


def test_a_recording_part_names_a_window_by_either_clock() -> None:
    (message,) = to_asked(parse_chat(chat(PART), LIMITS)).messages
    assert message.parts[0].recording == RecordingWindow(  # type: ignore[union-attr]  # it is a media part
        recording_id=RECORDING, start_s=5, end_s=9.5
    )
    by_capture = {"id": RECORDING, "start_time": "2027-01-15T08:00:00Z", "end_time": "2027-01-15T10:00:30.5+02:00"}
    (message,) = to_asked(parse_chat(chat({"type": "recording", "recording": by_capture}), LIMITS)).messages
    assert message.parts[0].recording == RecordingWindow(  # type: ignore[union-attr]
        recording_id=RECORDING, start_at=1_800_000_000.0, end_at=1_800_000_030.5
    )


@pytest.mark.parametrize(
    "given", ["yesterday", "2027-01-15T08:00:00", "2027-01-15", "1800000000", "2027-13-01T00:00:00Z"]
)
def test_a_capture_time_without_zone_or_sense_is_refused(given: str) -> None:
    part = {"type": "recording", "recording": {"id": RECORDING, "start_time": given}}
    with pytest.raises(InvalidRequest, match="must be a time like") as refused:
        to_asked(parse_chat(chat(part), LIMITS))
    assert refused.value.param == "messages[0].content[0].recording.start_time"


@pytest.mark.parametrize(
    ("recording", "status", "param"),
    [
        ({"id": "rec_1"}, 404, "messages[0].content[0].recording"),
        ({"id": "../../etc"}, 404, "messages[0].content[0].recording"),
        ({"id": RECORDING, "fps": 1}, 422, "messages[0].content[0].recording.fps"),
        ({"id": RECORDING, "start_s": "5"}, 422, "messages[0].content[0].recording.start_s"),
        ({"start_s": 5}, 422, "messages[0].content[0].recording.id"),
    ],
)
async def test_what_is_no_recording_part_is_refused_by_its_path(
    tmp_path: Path, recording: dict[str, Any], status: int, param: str
) -> None:
    async with serving(tmp_path) as gateway:
        content = [{"type": "recording", "recording": recording}, {"type": "text", "text": "What?"}]
        body = {"messages": [{"role": "user", "content": content}]}
        response = await gateway.client.post("/v1/chat/completions", json=body, headers=BEARER)
        assert response.status_code == status
        assert response.json()["error"]["param"] == param


async def test_over_http_the_question_names_the_window(tmp_path: Path) -> None:
    async with serving(tmp_path) as gateway:
        content = [PART, {"type": "text", "text": "What?"}]
        for stream in (False, True):
            body = {"messages": [{"role": "user", "content": content}], "stream": stream}
            response = await gateway.client.post("/v1/chat/completions", json=body, headers=BEARER)
            assert response.status_code == 200
        for question in gateway.pipeline.questions:
            assert question.media[0].recording == RecordingWindow(recording_id=RECORDING, start_s=5, end_s=9.5)
