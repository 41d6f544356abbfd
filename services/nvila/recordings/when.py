"""When something happens in a recording, however long: asked of each chunk, the answers joined into intervals.

Two questions per chunk. Does it happen here at all (yes or no)? And, for a model with time tokens, from when to when:
it answers with two words of the clip's own clock (`model/time_tokens.py`), which become seconds of the recording. A
model without them gives the whole chunk. Intervals that touch across chunks are one, unless a gap lies between them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from nvila.errors import InvalidRequest
from nvila.model.config import NvilaConfig
from nvila.model.time_tokens import SECONDS, decode_times, parse_interval
from nvila.model.wording import DOES_IT_HAPPEN
from nvila.recordings.asking import Asked, Caller, Held, Piece, Steps, Windows, begin, text_param
from nvila.recordings.captions import say_of_each
from nvila.recordings.types import Job
from nvila.recordings.window import Shelf

ANSWER_TOKENS = 16
METHODS = ("auto", "time_tokens", "yes_no")

_VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


class WhenHandler:
    """Params: the window; `question`: such as "When does a car stop?"; `method`: "yes_no" asks each chunk whether,
    "time_tokens" from when to when without asking whether, "auto" (the default) both as far as the model can; `here`:
    other words for the question whether.

    Result: `intervals` (`start_s`, `end_s`, `captured`, `chunks`), `unclear`: chunks that answered neither yes nor no,
    `method`, `window`, `captured`, `gaps`. Events: `chunk` as each is told, `interval` for each at the end.
    """

    def __init__(self, caller: Caller, windows: Windows, shelf: Shelf, *, at_once: int = 2) -> None:
        self._caller = caller
        self._windows = windows
        self._shelf = shelf
        self._at_once = at_once

    async def __call__(self, claim: Held) -> Mapping[str, Any]:
        job = claim.job
        question = text_param(job.params, "question")
        here = text_param(job.params, "here", DOES_IT_HAPPEN)
        config = NvilaConfig.from_json((await self._caller.describe()).config_json)
        asks_whether, asks_times = _method(job, config)
        steps = await Steps.of(claim)
        asked = await begin(steps, self._caller, self._windows, self._shelf, job)

        async def look(piece: Piece) -> Mapping[str, Any]:
            said: dict[str, Any] = {"happens": True}
            if asks_whether:
                answer = await self._ask(job, asked, piece, f"{question}\n{here}")
                said = {"happens": verdict(answer), "answer": answer}
            if said["happens"] and asks_times:
                answer = await self._ask(job, asked, piece, question)
                return said | {"times": answer} | _interval(answer, piece, config)
            return said

        chunks = await say_of_each(steps, asked.pieces, look, holds=("happens", "answer"), at_once=self._at_once)

        async def join() -> Mapping[str, Any]:
            return {"intervals": intervals_of(chunks, asked)}

        found = await steps.once("intervals", join, items=("interval", "intervals"))
        return {
            **asked.told(),
            **found,
            "unclear": [chunk["chunk"] for chunk in chunks if "happens" in chunk and chunk["happens"] is None],
            "method": {"whether": asks_whether, "time_tokens": config.time_tokens if asks_times else 0},
        }

    async def _ask(self, job: Job, asked: Asked, piece: Piece, text: str) -> str:
        window = piece.window(asked.window.recording_id)
        return (await self._caller.about(job, window, text, max_tokens=ANSWER_TOKENS)).text


def verdict(answer: str) -> bool | None:
    """The first yes or no of an answer; None when it says neither."""
    found = _VERDICT.search(answer)
    return None if found is None else found[1].casefold() == "yes"


def _method(job: Job, config: NvilaConfig) -> tuple[bool, bool]:
    method = job.params.get("method", "auto")
    if method not in METHODS:
        raise InvalidRequest(f"method: {method!r} given, must be one of {', '.join(METHODS)}", param="method")
    has_times = config.time_tokens >= 2
    if method == "time_tokens" and not has_times:
        raise InvalidRequest("method: time_tokens given, and the served model has none; ask for yes_no", param="method")
    return method != "time_tokens", has_times and method != "yes_no"


def _interval(answer: str, piece: Piece, config: NvilaConfig) -> dict[str, Any]:
    """The interval that an answer names, on the recording's clock; nothing when it names none."""
    duration_s = piece.end_s - piece.start_s
    told = decode_times(answer, duration_s, config.time_tokens, config.time_token_format)
    if len(SECONDS.findall(told)) < 2:
        return {}
    start_s, end_s = parse_interval(told, duration_s)
    return {"from_s": round(piece.start_s + start_s, 3), "to_s": round(piece.start_s + end_s, 3)}


def intervals_of(chunks: Sequence[Mapping[str, Any]], asked: Asked) -> list[dict[str, Any]]:
    """Intervals in order of time; a chunk that names none is one as a whole.

    Two are one when they are of neighbouring chunks, at most a tenth of a chunk apart, and no gap lies between.
    """
    found: list[dict[str, Any]] = []
    gaps = asked.gaps()  # in order, apart from each other
    gap_ends_s = [gap["end_s"] for gap in gaps]

    def is_gap_between(start_s: float, end_s: float) -> bool:
        first = bisect_right(gap_ends_s, start_s)
        return first < len(gaps) and bool(gaps[first]["start_s"] < end_s)

    for chunk in chunks:
        if not chunk.get("happens"):
            continue
        from_s, to_s = chunk.get("from_s", chunk["start_s"]), chunk.get("to_s", chunk["end_s"])
        slack_s = (chunk["end_s"] - chunk["start_s"]) / 10
        last = found[-1] if found else None
        if (
            last is not None
            and last["chunks"][1] == chunk["chunk"] - 1
            and from_s - last["end_s"] <= slack_s
            and not is_gap_between(last["end_s"], from_s)
        ):
            last["end_s"] = max(last["end_s"], to_s)
            last["chunks"][1] = chunk["chunk"]
        else:
            numbers = [chunk["chunk"], chunk["chunk"]]
            found.append({"start_s": from_s, "end_s": to_s, "chunks": numbers})
    for interval in found:
        interval["captured"] = {"from": asked.captured(interval["start_s"]), "to": asked.captured(interval["end_s"])}
    return found
