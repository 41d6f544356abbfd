"""What all jobs that ask about recordings share: one call of the model, steps that are done once, windows in params.

A job's answers are greedy, so the same question over the same tokens gives the same words: a job that was killed at any
place and done again gives the result of one that was not.
"""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from blake3 import blake3

from nvila.errors import InvalidRequest, LimitExceeded, NvilaError
from nvila.model.config import NvilaConfig
from nvila.model.estimate import text_at_most
from nvila.recordings.planner import Budget
from nvila.recordings.seal import SECRET
from nvila.recordings.types import Job, JobKind, RecordedChunk
from nvila.recordings.window import OpenWindow, Shelf, joined_gaps
from nvila.types import (
    Answered,
    AnswerEvent,
    Deadline,
    Gap,
    MediaKind,
    MediaPart,
    MediaSource,
    Message,
    ModelCard,
    Question,
    RecordingWindow,
    Role,
    SamplingParams,
    TextPart,
    TokensRef,
)

T = TypeVar("T")

MOST_QUESTION_CHARS = 8_000
MOST_ANSWER_TOKENS = 4_096


class Answerer(Protocol):
    """Answers one question with one or more model calls: the pipeline."""

    def answer(self, question: Question) -> AsyncGenerator[AnswerEvent, None]: ...
    async def describe(self) -> ModelCard: ...


class Windows(Protocol):
    """Plans windows (`RecordingWindows`)."""

    async def open(self, asked: RecordingWindow, tenant: str, budget: Budget, config: NvilaConfig) -> OpenWindow: ...


class Writes(Protocol):
    """What is written together (`jobs.ClaimTransaction`)."""

    async def checkpoint(self, step: str, payload: Mapping[str, Any]) -> bool: ...
    async def event(self, kind: str, data: Mapping[str, Any]) -> int: ...
    async def progress(self, data: Mapping[str, Any]) -> None: ...


class Held(Protocol):
    """What these handlers ask of a `jobs.Claim`."""

    @property
    def job(self) -> Job: ...
    async def checkpoints(self) -> Mapping[str, Mapping[str, Any]]: ...
    def transaction(self) -> AbstractAsyncContextManager[Writes]: ...


# -- one call ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Told:
    text: str
    answered: Answered


async def ask(answerer: Answerer, question: Question) -> Told:
    """The whole answer. Raises what the answerer raises."""
    text: list[str] = []
    async with aclosing(answerer.answer(question)) as events:
        async for event in events:
            if isinstance(event, Answered):
                return Told(text="".join(text).strip(), answered=event)
            text.append(event.text)
    raise AssertionError("an answer ends with `Answered` or an error")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Asks in a job's name, and is an `Answerer` that gives each question `call_s`, whenever it was made.

    `max_tokens`: of an answer, unless told.
    """

    answerer: Answerer
    call_s: float = 300.0
    max_tokens: int = 128

    def answer(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        return self.answerer.answer(replace(question, deadline=Deadline.after(self.call_s)))

    async def describe(self) -> ModelCard:
        return await self.answerer.describe()

    async def about(self, job: Job, window: RecordingWindow, text: str, *, max_tokens: int | None = None) -> Told:
        """What the model says to `text` about a window."""
        return await ask(self, self.question(job, [window], text, max_tokens=max_tokens))

    async def read(self, job: Job, text: str, *, max_tokens: int | None = None) -> Told:
        """What the model says to a text alone."""
        return await ask(self, self.question(job, [], text, max_tokens=max_tokens))

    def question(
        self, job: Job, windows: Sequence[RecordingWindow], text: str, *, max_tokens: int | None = None
    ) -> Question:
        parts: list[TextPart | MediaPart] = [*(MediaPart(place) for place in range(len(windows))), TextPart(text)]
        return Question(
            request_id=uuid.uuid4().hex,
            tenant=job.tenant,
            messages=(Message(Role.USER, tuple(parts)),),
            media=tuple(MediaSource(kind=MediaKind.VIDEO, recording=window, param="params") for window in windows),
            sampling=SamplingParams(max_tokens=max_tokens or self.max_tokens),
            deadline=Deadline.after(self.call_s),
        )


async def budget_of(answerer: Answerer, question: Question) -> tuple[Budget, NvilaConfig]:
    """What one call has for a window beside this question's text and answer."""
    card = await answerer.describe()
    config = NvilaConfig.from_json(card.config_json)
    text, answer = text_at_most(question.messages), question.sampling.max_tokens
    return Budget.of(config, longest=card.max_model_len, text=text, answer=answer), config


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; the first failure cancels the rest and is raised itself, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as group_error:
        leaves = list(_leaves(group_error))
        raise next((leaf for leaf in leaves if isinstance(leaf, NvilaError)), leaves[0]) from None
    return [task.result() for task in tasks]


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


# -- steps ------------------------------------------------------------------------------------------------------------


class Steps:
    """What a job's earlier attempts have done, and what this one adds: each step's result is kept and told once."""

    def __init__(self, claim: Held, done: Mapping[str, Mapping[str, Any]]) -> None:
        self._claim = claim
        self._done = dict(done)

    @classmethod
    async def of(cls, claim: Held) -> Steps:
        return cls(claim, await claim.checkpoints())

    def has(self, step: str) -> bool:
        return step in self._done

    async def once(
        self,
        step: str,
        work: Callable[[], Awaitable[Mapping[str, Any]]],
        *,
        event: str | None = None,
        items: tuple[str, str] | None = None,
        progress: Callable[[], Mapping[str, Any]] | None = None,
    ) -> Mapping[str, Any]:
        """What `work` gave, now or in an earlier attempt. Result, events and progress are one transaction: a kill at
        any moment leaves all of them or none. `event`: of this kind, with the result; `items`: (kind, name), one for
        each of the result's list of that name."""
        if step not in self._done:
            payload = plain(await work())
            async with self._claim.transaction() as write:
                if await write.checkpoint(step, payload):
                    if event is not None:
                        await write.event(event, payload)
                    for item in payload[items[1]] if items is not None else ():
                        await write.event(items[0], item)  # type: ignore[index]  # there are none without it
                    if progress is not None:
                        await write.progress(progress())
            self._done[step] = payload
        return self._done[step]


def plain(payload: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back: the first attempt goes on with the very values that a later one finds."""
    made: dict[str, Any] = json.loads(json.dumps(payload))
    return made


def fingerprint(kind: JobKind, params: Mapping[str, Any], recording_id: str) -> str:
    """Of a job's input (64 hex digits): equal inputs are equal, and checkpoints of another input are never used.

    A secret is no part of it: it changes no answer, and a plain digest of it would be a way to guess it."""
    told = {name: value for name, value in params.items() if name != SECRET}
    said = json.dumps([kind, recording_id, told], sort_keys=True, separators=(",", ":"))
    return blake3(said.encode(), derive_key_context="nvila job fingerprint").hexdigest()


# -- params -----------------------------------------------------------------------------------------------------------


def window_params(window: RecordingWindow) -> dict[str, float]:
    """A window as it stands in a job's params; the recording is the job's own."""
    bounds = {name: getattr(window, name) for name in ("start_s", "end_s", "start_at", "end_at")}
    return {name: value for name, value in bounds.items() if value is not None}


def window_of(job: Job) -> RecordingWindow:
    """The inverse. Raises `InvalidRequest` for what is no number."""
    assert job.recording_id is not None, "a job about a recording"
    bounds = {name: job.params.get(name) for name in ("start_s", "end_s", "start_at", "end_at")}
    for name, value in bounds.items():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise InvalidRequest(f"{name} must be a number of seconds, not {value!r}", param=name)
    return RecordingWindow(recording_id=job.recording_id, **bounds)


def text_param(params: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A text that is asked or told to the model. Raises `InvalidRequest` when it is missing, empty or too long."""
    value = params.get(name, default)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest(f"{name}: {value!r} given, must be a text", param=name)
    if len(value) > MOST_QUESTION_CHARS:
        raise LimitExceeded.of(f"characters of {name}", asked=len(value), limit=MOST_QUESTION_CHARS, param=name)
    return value.strip()


def count_param(params: Mapping[str, Any], name: str, *, most: int, default: int | None = None) -> int | None:
    """A number from 1 to `most`. Raises `InvalidRequest` for anything else."""
    value = params.get(name, default)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequest(f"{name}: {value!r} given, must be a whole number from 1", param=name)
    if value > most:
        raise LimitExceeded.of(name, asked=value, limit=most, param=name)
    return value


# -- chunks -----------------------------------------------------------------------------------------------------------


async def fixed_window(
    steps: Steps, windows: Windows, job: Job, budget: Budget, config: NvilaConfig
) -> RecordingWindow:
    """The job's window with both its ends, the same for all attempts although the recording grows meanwhile."""

    async def resolve() -> Mapping[str, Any]:
        opened = await windows.open(window_of(job), job.tenant, budget, config)
        reach_s = opened.recording.ingested_s  # what comes later is not of this job
        return {"start_s": opened.start_s, "end_s": min(opened.end_s, reach_s)}

    bounds = await steps.once("window", resolve)
    assert job.recording_id is not None
    return RecordingWindow(recording_id=job.recording_id, start_s=bounds["start_s"], end_s=bounds["end_s"])


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a job about chunks begins with: its window with both ends, and the chunks in it."""

    window: RecordingWindow
    captured_at: float | None
    pieces: list[Piece]

    def told(self) -> dict[str, Any]:
        """As it stands in results. Capture times are seconds since 1970, null when nobody knows."""
        assert self.window.start_s is not None, "a window that `fixed_window` gave"
        assert self.window.end_s is not None, "a window that `fixed_window` gave"
        return {
            "window": {"start_s": self.window.start_s, "end_s": self.window.end_s},
            "captured": {"from": self.captured(self.window.start_s), "to": self.captured(self.window.end_s)},
            "gaps": self.gaps(),
        }

    def gaps(self) -> list[dict[str, Any]]:
        return [asdict(gap) for gap in joined_gaps(gap for piece in self.pieces for gap in piece.gaps)]

    def captured(self, at_s: float) -> float | None:
        return None if self.captured_at is None else self.captured_at + at_s


async def begin(steps: Steps, caller: Caller, windows: Windows, shelf: Shelf, job: Job) -> Asked:
    """Raises what opening a window raises."""
    budget, config = await budget_of(caller, caller.question(job, [window_of(job)], ""))
    window = await fixed_window(steps, windows, job, budget, config)
    recording = await shelf.get(window.recording_id, tenant=job.tenant)
    return Asked(window=window, captured_at=recording.captured_at, pieces=await pieces(shelf, window))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A chunk, or what of it lies in the window. `is_unchanged`: all its frames look like all those of the chunk before
    it, so what was said of that is true of it. `has_frames`: there is anything to see."""

    number: int
    start_s: float
    end_s: float
    gaps: tuple[Gap, ...]
    is_unchanged: bool
    has_frames: bool

    def window(self, recording_id: str) -> RecordingWindow:
        return RecordingWindow(recording_id=recording_id, start_s=self.start_s, end_s=self.end_s)

    def told(self) -> dict[str, Any]:
        """As it stands in results and events."""
        gaps = [{"start_s": gap.start_s, "end_s": gap.end_s, "reason": gap.reason} for gap in self.gaps]
        return {"chunk": self.number, "start_s": self.start_s, "end_s": self.end_s, "gaps": gaps}


async def pieces(shelf: Shelf, window: RecordingWindow) -> list[Piece]:
    """The chunks of a window with both its ends, in order."""
    chunks = await shelf.chunks(window.recording_id, start_s=window.start_s, end_s=window.end_s)
    assert window.start_s is not None, "a window that `fixed_window` gave"
    assert window.end_s is not None, "a window that `fixed_window` gave"
    found: list[Piece] = []
    last: TokensRef | None = None
    for chunk in chunks:
        found.append(piece_of(chunk, window.start_s, window.end_s, last))
        last = only_ref(chunk) if found[-1].has_frames else None
    return found


def only_ref(chunk: RecordedChunk) -> TokensRef | None:
    """The tokens of a chunk all of whose frames look alike; None for any other."""
    refs = {group.ref for group in chunk.groups}
    return next(iter(refs)) if len(refs) == 1 else None


def piece_of(chunk: RecordedChunk, start_s: float, end_s: float, last: TokensRef | None) -> Piece:
    """`last`: the only tokens of the chunk before, if that was looked at and has only one kind."""
    begins_s, ends_s = max(chunk.start_s, start_s), min(chunk.end_s, end_s)
    inside = [
        group for group in chunk.groups if group.times_s and begins_s <= group.times_s[-1] and group.times_s[0] < ends_s
    ]
    gaps = [Gap(start_s=max(g.start_s, begins_s), end_s=min(g.end_s, ends_s), reason=g.reason) for g in chunk.gaps]
    return Piece(
        number=chunk.number,
        start_s=begins_s,
        end_s=ends_s,
        gaps=tuple(gap for gap in gaps if gap.start_s < gap.end_s),
        is_unchanged=bool(inside) and last is not None and all(g.is_static and g.ref == last for g in inside),
        has_frames=any(group.ref is not None for group in inside),
    )
