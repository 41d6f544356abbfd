"""A recording that is there, a model that says what a test says, and claims that die when they are told to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from nvila.cache.codec import Record, RecordFormat
from nvila.model.config import NvilaConfig
from nvila.recordings import encode
from nvila.recordings.asking import Caller
from nvila.recordings.claims import Claim, ClaimTransaction
from nvila.recordings.jobs import JobStore
from nvila.recordings.planner import Budget
from nvila.recordings.store import RecordingStore
from nvila.recordings.types import (
    ChunkPolicy,
    Group,
    Job,
    JobKind,
    RecordedChunk,
    Recording,
    RecordingState,
    SourceKind,
)
from nvila.recordings.window import OpenWindow, RecordingWindows
from nvila.types import (
    Answered,
    AnswerEvent,
    Coverage,
    Deadline,
    FinishReason,
    Gap,
    Level,
    MediaCoverage,
    MediaKind,
    ModelCard,
    PromptUsage,
    Question,
    RecordingWindow,
    TextDelta,
    TextPart,
    TokensRef,
    VisualTokens,
)
from tests.recordings import made
from tests.recordings.taking import CARD

CHUNK_S = 16.0
CAPTURED_AT = 1_800_000_000.0


def ref(number: int) -> TokensRef:
    return TokensRef(key=f"{number:064x}", levels=(Level(1, 256),))


def chunk_of(
    recording_id: str, number: int, *, keys: Sequence[int | None] | None = None, gaps: Sequence[Gap] = ()
) -> RecordedChunk:
    """16 s in two groups of eight frames. `keys`: of the groups' tokens; one that was there before is static; None: not
    decodable."""
    start_s = number * CHUNK_S
    given = [2 * number + 1, 2 * number + 2] if keys is None else keys
    return RecordedChunk(
        recording_id=recording_id,
        number=number,
        start_s=start_s,
        end_s=start_s + CHUNK_S,
        groups=tuple(
            Group(
                times_s=tuple(start_s + 8 * place + second for second in range(8)),
                segment=0,
                indices=tuple(range(8)),
                ref=None if key is None else ref(key),
                is_static=key is not None and key <= 2 * number and keys is not None,
            )
            for place, key in enumerate(given)
        ),
        gaps=tuple(gaps),
    )


async def fill(
    jobs: JobStore,
    chunks: Sequence[Callable[[str], RecordedChunk]] | int,
    *,
    tenant: str = "acme",
    state: RecordingState = RecordingState.COMPLETE,
    captured_at: float | None = CAPTURED_AT,
) -> Recording:
    """A recording of these chunks, as ingest would have left it."""
    kind = SourceKind.FILE if state is RecordingState.COMPLETE else SourceKind.RTSP
    recording = replace(made.recording(tenant, kind), policy=ChunkPolicy(chunk_s=CHUNK_S))
    await jobs.submit(tenant=tenant, kind=JobKind.INGEST, params={}, fingerprint=recording.id, recording=recording)
    claim = await made.claim(jobs, "ingest", JobKind.INGEST)
    makers = [partial(chunk_of, number=n) for n in range(chunks)] if isinstance(chunks, int) else chunks
    made_chunks = [make(recording.id) for make in makers]
    for chunk in made_chunks:
        await claim.add_chunk(chunk)
    reach_s = made_chunks[-1].end_s if made_chunks else 0.0
    await claim.update_recording(state=state, captured_at=captured_at, ingested_s=reach_s)
    await claim.finish({})
    return replace(recording, state=state, captured_at=captured_at, ingested_s=reach_s)


async def grow(
    jobs: JobStore,
    recording: Recording,
    chunk: RecordedChunk,
    state: RecordingState | None = None,
    *,
    captured_at: float | None = None,
) -> None:
    """One chunk more, as a camera's worker would write it; `captured_at` with the first one."""
    await jobs.submit(
        tenant=recording.tenant,
        kind=JobKind.INGEST,
        params={},
        fingerprint=f"{recording.id}{chunk.number}",
        recording_id=recording.id,
    )
    claim = await made.claim(jobs, "ingest", JobKind.INGEST)
    async with claim.transaction() as now:
        await now.add_chunk(chunk)
        await now.update_recording(ingested_s=chunk.end_s, state=state, captured_at=captured_at)
    await claim.finish({})


class Killed(BaseException):
    """What happens to a process that gets SIGKILL: nothing in it sees an error to handle."""


Say = Callable[[str, RecordingWindow | None], str]
"""What is said to a text about a window (None: to a text alone)."""


@dataclass
class Model:
    """An `Answerer`. `asked`: (text, window) of every answer that was given to its end."""

    say: Say = lambda text, window: "something"
    card: ModelCard = CARD
    asked: list[tuple[str, RecordingWindow | None]] = field(default_factory=list)
    dies_at: int | None = None
    is_dead: bool = False
    windows: RecordingWindows | None = None

    async def describe(self) -> ModelCard:
        return self.card

    async def answer(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        question.deadline.left_s()
        text = " ".join(
            part.text for message in question.messages for part in message.parts if isinstance(part, TextPart)
        )
        window = question.media[0].recording if question.media else None
        if self.is_dead or (self.dies_at is not None and len(self.asked) == self.dies_at):
            raise Killed
        said = self.say(text, window)
        yield TextDelta(said, (1,))
        self.asked.append((text, window))
        media: tuple[MediaCoverage, ...] = ()
        if window is not None:
            opened = await self._open(question, window)
            media = (_coverage(opened),)
        yield Answered(
            reason=FinishReason.STOP,
            usage=PromptUsage(text=10, image=0, video=100 * len(media)),
            completion_tokens=len(said.split()),
            coverage=Coverage(media=media, stage_ms={}),
        )

    async def _open(self, question: Question, window: RecordingWindow) -> OpenWindow:
        assert self.windows is not None
        config = NvilaConfig.from_json(self.card.config_json)
        budget = Budget.of(config, longest=self.card.max_model_len, text=10, answer=question.sampling.max_tokens)
        opened = await self.windows.open(window, question.tenant, budget, config)
        assert not opened.is_in_parts, "a part fits one call"
        return opened


def _coverage(opened: OpenWindow) -> MediaCoverage:
    return MediaCoverage(
        kind=MediaKind.VIDEO,
        frames_asked=opened.sampled,
        frames_decoded=0,
        frames_encoded=0,
        frames_reused=opened.sampled,
        frames_dropped=0,
        frames_padded=0,
        start_s=opened.start_s,
        end_s=opened.end_s,
        gaps=opened.gaps,
        tokens=opened.planned.plan.tokens,
        chunks=opened.chunks,
        cache_hits=len(opened.groups),
        tiles=0,
        recording=opened.coverage(),
    )


class NoTokens:
    """A cache, a cold store and an encoder that are never asked."""

    async def get(self, refs: object, form: RecordFormat) -> Any:
        raise AssertionError("not asked")

    async def put(self, record: Record) -> bool:
        raise AssertionError("not asked")

    async def encode_again(
        self, recording: Recording, group: Group, model: encode.Model, deadline: Deadline
    ) -> VisualTokens:
        raise AssertionError("not asked")


@dataclass
class Asking:
    """What handlers are made of. `caller` is the model's."""

    jobs: JobStore
    store: RecordingStore
    model: Model

    def __post_init__(self) -> None:
        nothing = NoTokens()
        self.windows = RecordingWindows(self.store, nothing, nothing, nothing)
        self.model.windows = self.windows
        self.caller = Caller(answerer=self.model, max_tokens=32)

    async def submit(self, kind: JobKind, recording: Recording, **params: Any) -> Job:
        return await self.jobs.submit(
            tenant=recording.tenant,
            kind=kind,
            params=params,
            fingerprint=f"{recording.id}{params}",
            recording_id=recording.id,
        )

    async def events(self, job: Job) -> list[tuple[str, Mapping[str, Any]]]:
        """All but progress."""
        events = await self.jobs.events_after(job.id, tenant=job.tenant)
        return [(event.kind, event.data) for event in events if event.kind != "progress"]


class Dying:
    """A claim whose process is killed at its `at`-th transaction: before it is committed, or right after."""

    def __init__(self, claim: Claim, model: Model, at: int, *, after: bool) -> None:
        self._claim = claim
        self._model = model
        self._at = at
        self._after = after
        self.transactions = 0

    @property
    def job(self) -> Job:
        return self._claim.job

    async def checkpoints(self) -> Mapping[str, Mapping[str, Any]]:
        return await self._claim.checkpoints()

    async def last_checkpoint(self, steps: str) -> Mapping[str, Any] | None:
        return await self._claim.last_checkpoint(steps)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[ClaimTransaction]:
        if self._model.is_dead:
            raise Killed
        self._model.is_dead = dies = self.transactions == self._at
        self.transactions += 1
        async with self._claim.transaction() as write:
            yield write
            if dies and not self._after:
                raise Killed
        if dies:
            raise Killed
