"""A question about a window too long for one call: a map over its stretches, and a last call over what they gave.

Each stretch is asked the client's own question with a line about which part it is; the answers become notes with their
times, and the notes stand in the last question where the recording stood. Notes that do not fit one call are condensed
first, as often as it takes. The gateway does this inline for a few stretches; `AskHandler` does it as a job for any
number, each answer a checkpoint.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from nvila.errors import InvalidRequest, LimitExceeded
from nvila.model.config import NvilaConfig
from nvila.model.estimate import text_at_most
from nvila.recordings.asking import (
    MOST_ANSWER_TOKENS,
    Answerer,
    Caller,
    Held,
    Steps,
    Told,
    Windows,
    ask,
    budget_of,
    count_param,
    text_param,
    together,
    window_of,
)
from nvila.recordings.planner import Budget, joined_plan
from nvila.recordings.search import Relevance
from nvila.recordings.types import Job
from nvila.recordings.window import OpenWindow
from nvila.types import (
    Coverage,
    Gap,
    MediaCoverage,
    MediaPart,
    MediaSource,
    Message,
    PromptUsage,
    Question,
    RecordingWindow,
    Role,
    TextPart,
)

PART_POSITIONS = 96
"""Most positions that `part_question` adds to a question."""

MOST_RELEVANT = 256


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a call said about a stretch. `frames`: that it stands on."""

    start_s: float
    end_s: float
    text: str
    frames: int
    gaps: tuple[Gap, ...]
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, told: Told, start_s: float, end_s: float) -> Note:
        answered = told.answered
        media = answered.coverage.media
        return cls(
            start_s=start_s,
            end_s=end_s,
            text=told.text,
            frames=sum(one.recording.plan.frames for one in media if one.recording is not None),
            gaps=tuple(gap for one in media if one.recording is not None for gap in one.gaps),
            prompt_tokens=answered.usage.total,
            completion_tokens=answered.completion_tokens,
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gaps": [asdict(gap) for gap in self.gaps]}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Note:
        return cls(**{**said, "gaps": tuple(Gap(**gap) for gap in said["gaps"])})

    def line(self) -> str:
        return f"[{clock(self.start_s)} to {clock(self.end_s)}] {self.text}"


def clock(at_s: float) -> str:
    """A time on a recording's clock as people write it: 1:04:16."""
    minutes, seconds = divmod(round(at_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


# -- questions made of a question -------------------------------------------------------------------------------------


def the_recording(media: Sequence[MediaSource], in_parts: Sequence[bool]) -> int:
    """Place of the one media item that needs several calls. Raises `InvalidRequest` when there are more."""
    places = [place for place, many in enumerate(in_parts) if many]
    if len(places) > 1:
        raise InvalidRequest(
            f"{len(places)} recordings' windows are too long for one call; a question can have one such window",
            param=media[places[1]].param,
        )
    return places[0]


def part_question(question: Question, place: int, window: RecordingWindow, number: int, count: int) -> Question:
    """The client's question about one stretch of the recording at `place`."""
    assert window.start_s is not None, "a stretch has both its ends"
    assert window.end_s is not None, "a stretch has both its ends"
    about = (
        f"\n(This is part {number + 1} of {count} of a longer recording, from {clock(window.start_s)} to "
        f"{clock(window.end_s)}. Answer for this part.)"
    )
    media = [replace(source, recording=window) if at == place else source for at, source in enumerate(question.media)]
    last = question.messages[-1]
    messages = (*question.messages[:-1], Message(last.role, (*last.parts, TextPart(about))))
    request_id = f"{question.request_id}-{number}"
    return replace(question, request_id=request_id, messages=messages, media=tuple(media))


def closing_question(question: Question, place: int, notes: Sequence[Note]) -> Question:
    """The client's question with notes in the place of the recording."""
    text = "Notes on a recording, part by part, with the time of each part:\n" + "\n".join(
        note.line() for note in notes
    )
    return _with_text(question, place, f"{text}\n\nAnswer from these notes, for the whole recording: ")


def _condensing_question(question: Question, notes: Sequence[Note]) -> Question:
    asked = " ".join(part.text for part in question.messages[-1].parts if isinstance(part, TextPart)).strip()
    text = (
        "Notes on a recording, part by part, with the time of each part:\n"
        + "\n".join(note.line() for note in notes)
        + f"\n\nSum up what these notes say about this, with times: {asked}"
    )
    return replace(question, request_id=uuid.uuid4().hex, messages=(Message(Role.USER, (TextPart(text),)),), media=())


def _with_text(question: Question, place: int, text: str) -> Question:
    """The question with a text where its media item `place` was; the items after it move up."""

    def part(one: TextPart | MediaPart) -> TextPart | MediaPart:
        if isinstance(one, TextPart) or one.index < place:
            return one
        return TextPart(text) if one.index == place else MediaPart(one.index - 1)

    messages = tuple(Message(message.role, tuple(part(one) for one in message.parts)) for message in question.messages)
    media = tuple(source for at, source in enumerate(question.media) if at != place)
    return replace(question, messages=messages, media=media)


# -- map and reduce ---------------------------------------------------------------------------------------------------

Once = Callable[[str, Callable[[], Awaitable[Note]]], Awaitable[Note]]
"""Does a step (named) unless an earlier attempt has done it."""


async def not_kept(step: str, work: Callable[[], Awaitable[Note]]) -> Note:
    """`Once` for a request that lives in one process: every step is done."""
    return await work()


async def map_stretches(
    question: Question,
    place: int,
    stretches: Sequence[RecordingWindow],
    answerer: Answerer,
    *,
    once: Once,
    at_once: int,
    after_each: Callable[[int, int], None] = lambda done, of: None,
) -> list[Note]:
    """A note on each stretch, in order of time, `at_once` of them asked about together. `after_each`: told how many are
    done; what it raises ends the work."""
    turns = asyncio.Semaphore(at_once)
    done = 0

    async def one(number: int, window: RecordingWindow) -> Note:
        async def look() -> Note:
            told = await ask(answerer, part_question(question, place, window, number, len(stretches)))
            return Note.of(told, window.start_s or 0.0, window.end_s or 0.0)

        nonlocal done
        async with turns:
            note = await once(f"part/{number}", look)
        done += 1
        after_each(done, len(stretches))
        return note

    return await together(one(number, window) for number, window in enumerate(stretches))


async def condense(
    question: Question, place: int, notes: list[Note], answerer: Answerer, longest: int, *, once: Once
) -> list[Note]:
    """Notes that fit the closing question of a model with `longest` positions; those given, if they do."""
    room = longest - question.sampling.max_tokens - 1
    level = 0
    while text_at_most(closing_question(question, place, notes).messages) > room:
        batches = _batches(question, notes, room)
        if len(batches) == len(notes):
            raise LimitExceeded.of(
                "tokens of one part's answer and the question, in a text",
                asked=text_at_most(_condensing_question(question, notes[:2]).messages),
                limit=room,
                param="max_tokens",
            )
        merged: list[Note] = []
        for number, batch in enumerate(batches):
            merged.append(await once(f"condense/{level}/{number}", partial(_merge, question, batch, answerer)))
        notes, level = merged, level + 1
    return notes


async def _merge(question: Question, notes: Sequence[Note], answerer: Answerer) -> Note:
    if len(notes) == 1:
        return notes[0]
    told = await ask(answerer, _condensing_question(question, notes))
    merged = Note.of(told, notes[0].start_s, notes[-1].end_s)
    return replace(merged, frames=sum(n.frames for n in notes), gaps=tuple(gap for n in notes for gap in n.gaps))


def _batches(question: Question, notes: Sequence[Note], room: int) -> list[list[Note]]:
    batches: list[list[Note]] = [[]]
    for note in notes:
        if batches[-1] and text_at_most(_condensing_question(question, [*batches[-1], note]).messages) > room:
            batches.append([])
        batches[-1].append(note)
    return batches


def total_usage(usages: Sequence[PromptUsage]) -> PromptUsage:
    return PromptUsage(
        text=sum(one.text for one in usages),
        image=sum(one.image for one in usages),
        video=sum(one.video for one in usages),
        cached=sum(one.cached for one in usages),
    )


def total_coverage(window: OpenWindow, parts: Sequence[Coverage], last: Coverage, media: int, place: int) -> Coverage:
    """What an answer in parts stands on: the window as one item at `place` of `media`, times of all calls together.

    Other items were part of every call; theirs is the last call's account.
    """
    looks = [part.media[place] for part in parts if len(part.media) == media]
    seen = sorted(looks, key=lambda one: one.start_s)
    item = replace(
        seen[0],
        frames_asked=window.sampled,
        frames_decoded=sum(one.frames_decoded for one in seen),
        frames_encoded=sum(one.frames_encoded for one in seen),
        frames_reused=sum(one.frames_reused for one in seen),
        frames_dropped=window.dropped,
        frames_padded=sum(one.frames_padded for one in seen),
        end_s=seen[-1].end_s,
        gaps=window.gaps,
        tokens=sum(one.tokens for one in seen),
        chunks=window.chunks,
        cache_hits=sum(one.cache_hits for one in seen),
        tiles=sum(one.tiles for one in seen),
        recording=window.coverage(),
    )
    others = list(last.media)
    stages: dict[str, float] = {}
    for coverage in (*parts, last):
        for stage, ms in coverage.stage_ms.items():
            stages[stage] = round(stages.get(stage, 0.0) + ms, 3)
    items: list[MediaCoverage] = [*others[:place], item, *others[place:]]
    assert len(items) == media, "the last call has every item but the recording"
    return Coverage(media=tuple(items), stage_ms=stages)


# -- the job ----------------------------------------------------------------------------------------------------------


class AskHandler:
    """Answers a question over any window as a job.

    Params: `question`; `start_s`, `end_s` or `start_at`, `end_at`; `max_tokens`; `relevant_chunks`: look only at so
    many chunks, those most like the question (`search.py`). Result: `text`, `window`, `plan`, `gaps`, `parts` (notes),
    `usage`. Events: `plan`, `part` for each note, `answer`.
    """

    def __init__(self, caller: Caller, windows: Windows, relevance: Relevance, *, at_once: int = 2) -> None:
        self._caller = caller
        self._windows = windows
        self._relevance = relevance
        self._at_once = at_once

    async def __call__(self, claim: Held) -> Mapping[str, Any]:
        job, caller = claim.job, self._caller
        text = text_param(job.params, "question")
        max_tokens = count_param(job.params, "max_tokens", most=MOST_ANSWER_TOKENS)
        relevant = count_param(job.params, "relevant_chunks", most=MOST_RELEVANT)
        steps = await Steps.of(claim)
        question = caller.question(job, [window_of(job)], text, max_tokens=max_tokens)
        plan = await steps.once("plan", lambda: self._plan(job, question, text, relevant), event="plan")
        stretches = [
            RecordingWindow(recording_id=job.recording_id or "", start_s=start_s, end_s=end_s)
            for start_s, end_s in plan["stretches"]
        ]

        done: set[str] = set()

        async def once(step: str, work: Callable[[], Awaitable[Note]]) -> Note:
            async def note() -> Mapping[str, Any]:
                return (await work()).to_json()

            def progress() -> Mapping[str, Any]:
                done.add(step)
                return {"done": len(done), "of": len(stretches)}

            if not step.startswith("part/"):
                return Note.from_json(await steps.once(step, note))
            said = await steps.once(step, note, event="part", progress=progress)
            done.add(step)
            return Note.from_json(said)

        notes = await self._look(question, stretches, once)
        answer = notes[0] if len(notes) == 1 else await self._close(question, notes, once)
        said = [answer] if len(notes) == 1 else [*notes, answer]
        return {
            **plan,
            "text": answer.text,
            "parts": [note.to_json() for note in notes],
            "usage": {
                "prompt_tokens": sum(note.prompt_tokens for note in said),
                "completion_tokens": sum(note.completion_tokens for note in said),
            },
        }

    async def _plan(self, job: Job, question: Question, text: str, relevant: int | None) -> Mapping[str, Any]:
        budget, config = await budget_of(self._caller, question)
        budget = replace(budget, part_text=PART_POSITIONS)
        opened = await self._windows.open(window_of(job), job.tenant, budget, config)
        looked = told = [opened]
        chosen: list[dict[str, Any]] = []
        if relevant is not None:
            window = RecordingWindow(recording_id=opened.recording.id, start_s=opened.start_s, end_s=opened.end_s)
            found = await self._relevance.most_like(text, window, job.tenant, relevant)
            chosen = [hit.to_json() for hit in found]
            spans = joined([(hit.start_s, hit.end_s) for hit in found])
            looked = told = await self._open_each(job, spans, budget.of_part(), config)
        elif opened.end_s > (reach_s := opened.recording.ingested_s):  # what comes later is not of this job
            looked = await self._open_each(job, [(opened.start_s, reach_s)], budget, config)
        coverage = opened.coverage()
        return {
            "window": {"start_s": opened.start_s, "end_s": opened.end_s},
            "captured": {"from": coverage.captured_from, "to": coverage.captured_to},
            "plan": asdict(joined_plan([one.planned for one in looked], budget, config)),
            "relevant": chosen,
            "frames_static": sum(one.coverage().frames_static for one in looked),
            "gaps": [asdict(gap) for one in told for gap in one.gaps],
            "stretches": [(part.start_s, part.end_s) for one in looked for part in one.planned.stretches],
        }

    async def _open_each(
        self, job: Job, spans: Sequence[tuple[float, float]], budget: Budget, config: NvilaConfig
    ) -> list[OpenWindow]:
        """Windows on these spans, each of which is asked about as a part, or as several."""
        recording_id = job.recording_id or ""
        windows = [RecordingWindow(recording_id=recording_id, start_s=start_s, end_s=end_s) for start_s, end_s in spans]
        return [await self._windows.open(window, job.tenant, budget, config) for window in windows]

    async def _look(self, question: Question, stretches: Sequence[RecordingWindow], once: Once) -> list[Note]:
        if len(stretches) > 1:
            return await map_stretches(question, 0, stretches, self._caller, once=once, at_once=self._at_once)
        window = stretches[0]
        only = replace(question, media=(replace(question.media[0], recording=window),))

        async def look() -> Note:
            return Note.of(await ask(self._caller, only), window.start_s or 0.0, window.end_s or 0.0)

        return [await once("part/0", look)]

    async def _close(self, question: Question, notes: list[Note], once: Once) -> Note:
        longest = (await self._caller.describe()).max_model_len
        fitting = await condense(question, 0, notes, self._caller, longest, once=once)

        async def close() -> Note:
            told = await ask(self._caller, closing_question(question, 0, fitting))
            return Note.of(told, notes[0].start_s, notes[-1].end_s)

        return await once("answer", close)


def joined(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans in order of time, those that touch as one."""
    found: list[tuple[float, float]] = []
    for start_s, end_s in sorted(spans):
        if found and start_s <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end_s)
        else:
            found.append((start_s, end_s))
    return found
