"""A summary of any stretch of a recording: captions of chunks, sections over them, the whole over those.

It grows while it is made: each caption, each section and the whole is an event as soon as it is there, with its time
range and the gaps in it. Each is a checkpoint too, so a job that was killed repeats nothing but what was under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvila.model.estimate import text_at_most
from nvila.model.wording import CAPTION
from nvila.recordings.asking import (
    MOST_ANSWER_TOKENS,
    Caller,
    Held,
    Piece,
    Steps,
    Windows,
    begin,
    count_param,
    text_param,
)
from nvila.recordings.captions import say_of_each
from nvila.recordings.questions import clock
from nvila.recordings.types import Job
from nvila.recordings.window import Shelf

SECTION = "Sum up these notes on part of a recording in a short paragraph, in order of time."
WHOLE = "Sum up these notes on a recording, in order of time. Name what matters most and when it happens."
SECTION_CHUNKS = 16
MOST_SECTION_CHUNKS = 256

Item = Mapping[str, Any]
"""`start_s`, `end_s`, `text`, `gaps`."""


class SummaryHandler:
    """Params: the window; `caption`, `section`, `whole`: other words for the three questions; `section_chunks`;
    `max_tokens`: of each answer.

    Result: `text`, `window`, `captured`, `gaps`, `sections`, `chunks`. Events: `chunk`, `section`, `summary`.
    """

    def __init__(self, caller: Caller, windows: Windows, shelf: Shelf, *, at_once: int = 2) -> None:
        self._caller = caller
        self._windows = windows
        self._shelf = shelf
        self._at_once = at_once

    async def __call__(self, claim: Held) -> Mapping[str, Any]:
        job = claim.job
        caption = text_param(job.params, "caption", CAPTION)
        in_section = text_param(job.params, "section", SECTION)
        in_whole = text_param(job.params, "whole", WHOLE)
        size = count_param(job.params, "section_chunks", most=MOST_SECTION_CHUNKS, default=SECTION_CHUNKS)
        tokens = count_param(job.params, "max_tokens", most=MOST_ANSWER_TOKENS)
        assert size is not None, "it has a default"
        steps = await Steps.of(claim)
        asked = await begin(steps, self._caller, self._windows, self._shelf, job)

        async def describe(piece: Piece) -> Item:
            told = await self._caller.about(job, piece.window(asked.window.recording_id), caption, max_tokens=tokens)
            return {"text": told.text, "frames_seen": _frames_seen(told.answered.coverage.media)}

        chunks: list[Item] = []
        sections: list[Item] = []
        for first in range(0, len(asked.pieces), size):
            pieces = asked.pieces[first : first + size]
            said = await say_of_each(
                steps, pieces, describe, holds=("text",), at_once=self._at_once, done=first, of=len(asked.pieces)
            )
            chunks += said
            step = f"section/{first // size}"
            sections.append(await self._summed(steps, job, step, "section", in_section, said, tokens))
        whole = await self._summed(steps, job, "whole", "summary", in_whole, sections, tokens)
        return {**asked.told(), "text": whole["text"], "sections": sections, "chunks": chunks}

    async def _summed(
        self, steps: Steps, job: Job, step: str, event: str, question: str, items: Sequence[Item], tokens: int | None
    ) -> Item:
        """One text over several; of one, its own. Those that do not fit one call are summed up in batches first."""
        card = await self._caller.describe()
        room = card.max_model_len - (tokens or self._caller.max_tokens) - 1

        def fits(some: Sequence[Item]) -> bool:
            return text_at_most(self._caller.question(job, [], _notes(question, some)).messages) <= room

        level = 0
        while len(items) > 1 and not fits(items):
            batches: list[list[Item]] = [[]]
            for item in items:
                if len(batches[-1]) > 1 and not fits([*batches[-1], item]):
                    batches.append([])
                batches[-1].append(item)
            items = [
                await self._once(steps, job, f"{step}/{level}/{number}", None, question, batch, tokens)
                for number, batch in enumerate(batches)
            ]
            level += 1
        return await self._once(steps, job, step, event, question, items, tokens)

    async def _once(
        self,
        steps: Steps,
        job: Job,
        step: str,
        event: str | None,
        question: str,
        items: Sequence[Item],
        tokens: int | None,
    ) -> Item:
        async def work() -> Item:
            told = [item for item in items if item.get("text")]
            if len(told) > 1:
                text = (await self._caller.read(job, _notes(question, items), max_tokens=tokens)).text
            else:
                text = told[0]["text"] if told else ""
            return {
                "start_s": items[0]["start_s"],
                "end_s": items[-1]["end_s"],
                "text": text,
                "gaps": [gap for item in items for gap in item["gaps"]],
            }

        return await steps.once(step, work, event=event)


def _notes(question: str, items: Sequence[Item]) -> str:
    lines = []
    for item in items:
        if item.get("text") and not item.get("is_unchanged"):
            lines.append(f"[{clock(item['start_s'])} to {clock(item['end_s'])}] {item['text']}")
        elif item.get("text"):
            lines.append(f"[{clock(item['start_s'])} to {clock(item['end_s'])}] nothing changes")
        lines += [
            f"[{clock(gap['start_s'])} to {clock(gap['end_s'])}] not seen: {gap['reason']}" for gap in item["gaps"]
        ]
    return question + "\n" + "\n".join(lines)


def _frames_seen(media: Sequence[Any]) -> int:
    return sum(one.recording.plan.frames for one in media if one.recording is not None)
