"""A timeline of events: what each chunk shows, in a few words, and neighbours that show the same as one event."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nvila.model.wording import LABEL, NOTHING
from nvila.recordings.asking import (
    MOST_ANSWER_TOKENS,
    Asked,
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
from nvila.recordings.window import Shelf

LABEL_TOKENS = 32


class TimelineHandler:
    """Params: the window; `question`: that each chunk is asked instead; `max_tokens`.

    Result: `events` (`start_s`, `end_s`, `captured`, `label`, `chunks`), `window`, `captured`, `gaps`. Events: `chunk`
    as each is told, `event` for each of the timeline at the end. A chunk of which the model says "nothing" makes none.
    """

    def __init__(self, caller: Caller, windows: Windows, shelf: Shelf, *, at_once: int = 2) -> None:
        self._caller = caller
        self._windows = windows
        self._shelf = shelf
        self._at_once = at_once

    async def __call__(self, claim: Held) -> Mapping[str, Any]:
        job = claim.job
        question = text_param(job.params, "question", LABEL)
        tokens = count_param(job.params, "max_tokens", most=MOST_ANSWER_TOKENS, default=LABEL_TOKENS)
        steps = await Steps.of(claim)
        asked = await begin(steps, self._caller, self._windows, self._shelf, job)

        async def label(piece: Piece) -> Mapping[str, Any]:
            told = await self._caller.about(job, piece.window(asked.window.recording_id), question, max_tokens=tokens)
            return {"label": one_line(told.text)}

        chunks = await say_of_each(steps, asked.pieces, label, holds=("label",), at_once=self._at_once)

        async def join() -> Mapping[str, Any]:
            return {"events": events_of(chunks, asked)}

        timeline = await steps.once("timeline", join, items=("event", "events"))
        return {**asked.told(), **timeline}


def one_line(text: str) -> str:
    """A label: the first line that says something, without the full stop."""
    return next((line.strip().rstrip(".") for line in text.splitlines() if line.strip()), "")


def events_of(chunks: Sequence[Mapping[str, Any]], asked: Asked) -> list[dict[str, Any]]:
    """Neighbours with the same label are one event; a gap between them ends it."""
    events: list[dict[str, Any]] = []
    for chunk in chunks:
        label = chunk.get("label", "")
        if not label or _plain(label) == NOTHING:
            continue
        last = events[-1] if events else None
        goes_on = last is not None and last["chunks"][1] == chunk["chunk"] - 1 and not _begins_with_gap(chunk)
        if last is not None and goes_on and _plain(last["label"]) == _plain(label):
            last["end_s"] = chunk["end_s"]
            last["chunks"][1] = chunk["chunk"]
        else:
            numbers = [chunk["chunk"], chunk["chunk"]]
            events.append({"start_s": chunk["start_s"], "end_s": chunk["end_s"], "label": label, "chunks": numbers})
    for event in events:
        event["captured"] = {"from": asked.captured(event["start_s"]), "to": asked.captured(event["end_s"])}
    return events


def _plain(label: str) -> str:
    return " ".join(re.findall(r"\w+", label.casefold()))


def _begins_with_gap(chunk: Mapping[str, Any]) -> bool:
    return any(gap["start_s"] <= chunk["start_s"] for gap in chunk["gaps"])
