"""A recording outlives the model that it was recorded for: what its footage still shows is answered under another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nvila.cache.codec import Record, RecordFormat
from nvila.errors import InvalidRequest, NotFound
from nvila.gateway.pipeline import Pipeline, PipelineLimits
from nvila.recordings.asking import Caller
from nvila.recordings.encode import GroupEncoder, LostTokens, Model
from nvila.recordings.footage import DeleteHandler
from nvila.recordings.jobs import JobStore
from nvila.recordings.planner import Budget
from nvila.recordings.questions import AskHandler
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import ChunkPolicy, Job, JobKind, JobState, Recording
from nvila.recordings.window import RecordingWindows
from nvila.recordings.worker import Pool, Worker, WorkerLimits
from nvila.telemetry.metrics import Metrics
from nvila.types import (
    Accepted,
    Answered,
    Deadline,
    DecodeEvent,
    Finished,
    FinishReason,
    GenerateRequest,
    MediaCoverage,
    MediaKind,
    MediaPart,
    MediaSource,
    Message,
    ModelCard,
    PromptUsage,
    Question,
    RecordingWindow,
    Role,
    SamplingParams,
    TextDelta,
    TextPart,
    TokenDtype,
    TokensMissing,
    TokensRef,
    VisualTokens,
)
from nvila.video.pool import DecodePool
from tests.recordings import taking as fakes
from tests.recordings.taking import CARD, CONFIG, NEW_CARD, Taking, Vision, write_clip
from tests.video.conftest import decode_pool

_POLICY = ChunkPolicy(fps=1.0, chunk_s=16.0)


class Hot(fakes.Hot):
    """As Redis: it tells of a record by its name, and gives it only to who expects its weights."""

    async def has(self, refs: Iterable[TokensRef], form: RecordFormat) -> set[str]:
        return {ref.key for ref in refs} & self.records.keys()

    async def get(self, refs: Iterable[TokensRef], form: RecordFormat) -> dict[str, VisualTokens]:
        found = await super().get(refs, form)
        return {key: one for key, one in found.items() if (one.vision_revision, one.dtype) == _kind(form)}

    async def put(self, record: Record) -> bool:
        return record.key in self.records  # vision has just published it; nothing here is only cold

    async def recall(self, plan_key: str) -> bytes | None:
        return None

    async def remember(self, plan_key: str, plan: bytes) -> None:
        pass


def _kind(form: RecordFormat) -> tuple[str, TokenDtype]:
    return form.vision_revision, form.dtype


@dataclass
class Decoder:
    """Says something when it has every record, of its own weights."""

    hot: Hot
    card: ModelCard

    async def describe(self) -> ModelCard:
        return self.card

    async def generate(self, request: GenerateRequest) -> AsyncIterator[DecodeEvent]:
        refs = [ref for media in request.media for ref in media.records]
        inline = {one.ref.key for one in request.inline}
        missing = [ref.key for ref in refs if ref.key not in inline]
        there = await self.hot.get([ref for ref in refs if ref.key in missing], Model.of(self.card).form)
        if set(missing) - there.keys():
            yield TokensMissing(keys=tuple(set(missing) - there.keys()))
            return
        usage = PromptUsage(text=5, image=0, video=7)
        yield Accepted(prompt=usage)
        yield TextDelta(f"as {self.card.vision_revision} sees it", (1,))
        yield Finished(reason=FinishReason.STOP, prompt=usage, completion_tokens=1, stage_ms={})


@dataclass
class Serving:
    """A gateway and the services behind it, of one model, beside what others have kept."""

    taking: Taking
    card: ModelCard
    recovery_s: float = 5.0

    def __post_init__(self) -> None:
        hot = self.taking.hot
        assert isinstance(hot, Hot)
        self.vision = Vision(hot, revision=self.card.vision_revision)
        encoder = GroupEncoder(self.taking.cold, hot, self.vision, recovery_s=0.2)
        lost = LostTokens(self.taking.shelf, self.taking.cold, self.taking.frames, encoder)
        self.windows = RecordingWindows(self.taking.shelf, hot, self.taking.cold, lost)
        self.pipeline = Pipeline(
            fetcher=None,  # type: ignore[arg-type]  # nothing is fetched
            frames=self.taking.frames,
            store=hot,
            vision=self.vision,
            decoder=Decoder(hot, self.card),
            limits=PipelineLimits(recovery_s=self.recovery_s),
            metrics=Metrics(),
            recordings=self.windows,
        )

    async def ask(self, recording: Recording, **window: float) -> tuple[str, MediaCoverage]:
        asked = RecordingWindow(recording_id=recording.id, **window)
        question = Question(
            request_id="r",
            tenant=recording.tenant,
            messages=(Message(Role.USER, (MediaPart(0), TextPart("What happens?"))),),
            media=(MediaSource(kind=MediaKind.VIDEO, recording=asked, param="messages[0].content[0].recording"),),
            sampling=SamplingParams(max_tokens=16),
            deadline=Deadline.after(60.0),
        )
        text = ""
        async for event in self.pipeline.answer(question):
            if isinstance(event, Answered):
                return text, event.coverage.media[0]
            text += event.text
        raise AssertionError("an answer ends with `Answered` or an error")

    async def job(self, recording: Recording) -> Job:
        """An ask job, done by a worker of this model."""
        nobody: Any = None
        handler = AskHandler(Caller(answerer=self.pipeline), self.windows, nobody)
        limits = WorkerLimits(pools=(Pool((JobKind.ASK,), 1, 60.0),), poll_s=0.05, first_pause_s=0.05)
        worker = Worker("worker", self.taking.jobs, {JobKind.ASK: handler}, limits, Metrics())
        job = await self.taking.jobs.submit(
            tenant=recording.tenant,
            kind=JobKind.ASK,
            params={"question": "What happens?"},
            fingerprint="f",
            recording_id=recording.id,
        )
        work = asyncio.create_task(worker.run())
        async for _ in self.taking.jobs.follow(job.id, tenant=recording.tenant):
            pass
        worker.end()
        await work
        return await self.taking.jobs.get(job.id, tenant=recording.tenant)


@pytest.fixture(scope="module")
async def frames() -> AsyncIterator[DecodePool]:
    async with decode_pool(arena_bytes=96 * 1024**2) as pool:
        yield pool


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/recordings.db"


@pytest.fixture
def taking(store: RecordingStore, jobs: JobStore, frames: DecodePool, tmp_path: Path) -> Taking:
    return Taking.over(store, jobs, frames, tmp_path, hot=Hot())


@pytest.fixture
async def recording(taking: Taking, tmp_path: Path) -> Recording:
    """32 s, recorded for the old model."""
    return await taking.take_in(write_clip(tmp_path / "a.mp4", 32.0), _POLICY)


@pytest.mark.parametrize(
    "card", [NEW_CARD, replace(CARD, token_dtype=TokenDtype.INT8)], ids=["other weights", "another storage type"]
)
async def test_a_question_about_kept_footage_is_answered_and_its_frames_are_encoded_once(
    taking: Taking, recording: Recording, card: ModelCard
) -> None:
    new = Serving(taking, card)
    text, first = await new.ask(recording)
    _, again = await new.ask(recording, start_s=8.0)
    assert text == f"as {card.vision_revision} sees it"
    assert (first.frames_encoded, first.frames_reused, first.cache_hits) == (32, 0, 0)
    assert (again.frames_encoded, again.frames_reused, again.cache_hits) == (0, 24, 3)
    assert new.vision.frames == 32


async def test_what_was_encoded_again_is_kept_cold_and_goes_with_the_recording(
    taking: Taking, recording: Recording, tmp_path: Path
) -> None:
    new = Serving(taking, NEW_CARD)
    await new.ask(recording)
    for ref in (
        (await new.windows.open(*await _opening(new, recording))).served_by(CONFIG, Model.of(NEW_CARD).form).refs
    ):
        assert await taking.cold.get(ref, Model.of(NEW_CARD).form) is not None
    await taking.jobs.delete_recording(recording.id, tenant="acme")
    await DeleteHandler(taking.cold, lambda recording_id: None)(await taking.claim(JobKind.DELETE))
    assert [path for path in (tmp_path / "cold" / "tokens").rglob("*") if path.is_file()] == []


async def _opening(serving: Serving, recording: Recording) -> tuple[Any, ...]:
    budget = Budget.of(CONFIG, longest=serving.card.max_model_len, text=10, answer=10)
    return RecordingWindow(recording_id=recording.id), recording.tenant, budget, CONFIG


async def test_while_two_models_are_served_each_has_its_own_tokens(taking: Taking, recording: Recording) -> None:
    old, new = Serving(taking, CARD), Serving(taking, NEW_CARD)
    answers = [await serving.ask(recording) for serving in (old, new, old, new)]
    assert [text for text, _ in answers] == ["as vision-1 sees it", "as vision-2 sees it"] * 2
    assert (old.vision.frames, new.vision.frames) == (0, 32)


async def test_what_looked_alike_is_encoded_once_for_the_new_model_too(taking: Taking, tmp_path: Path) -> None:
    recording = await taking.take_in(write_clip(tmp_path / "still.mp4", 32.0, still=True), _POLICY)
    new = Serving(taking, NEW_CARD)
    _, media = await new.ask(recording, start_s=16.0)
    assert new.vision.frames == 8
    assert media.recording is not None
    assert media.recording.frames_static == 16


async def test_a_window_of_both_models_is_one_answer(taking: Taking, tmp_path: Path) -> None:
    """The model changes in the middle of an ingest; the worker after it goes on."""
    clip = write_clip(tmp_path / "a.mp4", 192.0)  # long enough that the first worker does not end with it
    recording_id = await taking.submit(clip, _POLICY)
    claim = await taking.claim()
    work = asyncio.ensure_future(taking.handler()(claim))
    while await taking.shelf.count_chunks(recording_id) < 1:
        await asyncio.sleep(0.005)
    work.cancel()
    await asyncio.wait({work})
    await claim.release()
    taking.models.card, taking.vision.revision = NEW_CARD, NEW_CARD.vision_revision
    claim = await taking.claim()
    await claim.finish(await taking.handler()(claim))
    new = Serving(taking, NEW_CARD)
    text, media = await new.ask(await taking.shelf.get(recording_id, tenant="acme"))
    assert text == "as vision-2 sees it"
    assert 0 < media.frames_encoded < 192


async def test_without_footage_the_question_is_refused_at_once_and_says_why(
    taking: Taking, recording: Recording
) -> None:
    await taking.cold.forget_segments(recording.id)
    new = Serving(taking, NEW_CARD)
    began = time.monotonic()
    with pytest.raises(NotFound, match=r"another model .* footage .* is not kept any more") as refused:
        await new.ask(recording)
    assert time.monotonic() - began < new.recovery_s
    assert refused.value.param == "messages[0].content[0].recording"
    assert new.vision.calls == 0


async def test_a_job_is_done_under_the_new_model(taking: Taking, recording: Recording) -> None:
    job = await Serving(taking, NEW_CARD).job(recording)
    assert (job.state, job.error) == (JobState.DONE, "")
    assert job.result is not None
    assert job.result["text"] == "as vision-2 sees it"


async def test_a_job_about_footage_that_is_gone_fails_once_and_for_good(taking: Taking, recording: Recording) -> None:
    await taking.cold.forget_segments(recording.id)
    job = await Serving(taking, NEW_CARD).job(recording)
    assert (job.state, job.error_code, job.attempt) == (JobState.FAILED, "not_found", 1)


async def test_a_model_that_takes_fewer_frames_at_a_time_says_so(taking: Taking, recording: Recording) -> None:
    config = replace(CONFIG, pool_sizes=((4, 1, 1),))
    assert config.temporal_group == 4
    new = Serving(taking, replace(NEW_CARD, config_json=config.to_json()))
    with pytest.raises(InvalidRequest, match=r"groups of 8 frames .* takes 4 at a time"):
        await new.ask(recording)
